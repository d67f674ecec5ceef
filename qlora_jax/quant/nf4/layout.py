"""How NF4 lays a matrix out: blocks, and the rows that the packed arrays keep."""

BLOCK = 64
NESTED_BLOCK = 256


def row_layout(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, E): the rows that the packed arrays keep, and the elements in each (see NF4Tensor)."""
    n, k = shape
    return (n, k) if k % BLOCK == 0 else (1, n * k)


def check_rows(shape: tuple[int, ...], what: str) -> None:
    """Refuses a matrix whose rows are no whole number of blocks. Raises ValueError."""
    if shape[1] % BLOCK:
        raise ValueError(
            f"{what} in NF4 needs rows of a multiple of {BLOCK} elements, this matrix is {tuple(shape)}: "
            f"store it in int8, or as it is (none)"
        )
