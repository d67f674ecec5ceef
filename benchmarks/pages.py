"""Parts of the documentation that a command fills: between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

import re
from pathlib import Path


def fill_part(page: Path, name: str, text: str) -> None:
    """Replaces the part `name` of a page by `text`, whole lines. Raises ValueError where the page has no such part."""
    whole = page.read_text()
    start, end = _place(page, name, whole)
    page.write_text(whole[:start] + text + whole[end:])


def read_part(page: Path, name: str) -> str:
    """The part `name` of a page. Raises ValueError where the page has no such part."""
    whole = page.read_text()
    return whole[slice(*_place(page, name, whole))]


def _place(page: Path, name: str, whole: str) -> tuple[int, int]:
    found = re.search(rf"<!-- {name}: begin -->\n(.*)<!-- {name}: end -->", whole, re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no part '<!-- {name}: begin -->': put its two marks where it shall stand")
    return found.span(1)
