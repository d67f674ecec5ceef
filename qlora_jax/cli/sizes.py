"""Sizes in words."""


def size(count: int) -> str:
    """Bytes in GB or, where that would be little, in MB (10⁹ and 10⁶ bytes); a dash for nothing."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count else "-"
