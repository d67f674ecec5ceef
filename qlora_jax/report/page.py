"""HTML pages in one file each, without external resources: text is escaped, styles and parts are shared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of length `value`, in the colour of `style`, with `rest` after it in a lighter one; `words` stand by it."""

    name: str
    value: float
    words: str
    rest: float = 0.0
    style: str = "first"
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Bars of one scale under a title; the note explains them."""

    title: str
    bars: Sequence[Bar]
    note: str = ""

    @property
    def longest(self) -> float:
        """The length of the longest bar; 1 where all are empty."""
        return max((bar.value + bar.rest for bar in self.bars), default=0) or 1.0


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Renders one of this package's templates into `path`; returns it."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("qlora_jax.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    path.write_text(pages.get_template(template).render(**values), encoding="utf-8")
    return path
