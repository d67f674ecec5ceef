"""Parts of the documentation that a command fills: between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

import re
from pathlib import Path


def fill_part(page: Path, name: str, text: str) -> None:
    """Replaces the part `name` of a page by `text`, whole lines. Raises ValueError where the page has no such part."""
    marked = re.compile(rf"(<!-- {name}: begin -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    filled, count = marked.subn(lambda m: m[1] + text + m[2], page.read_text())
    if not count:
        raise ValueError(f"{page} has no part '<!-- {name}: begin -->': put its two marks where it shall stand")
    page.write_text(filled)
