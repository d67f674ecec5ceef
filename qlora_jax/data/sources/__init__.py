"""Rows from wherever they lie: a file, a folder, a pattern, a saved data set, or one of the Hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from qlora_jax.data.row import Row
from qlora_jax.data.sources.datasets import HUB_ID, is_saved, of_hub, of_saved
from qlora_jax.data.sources.files import is_pattern, of_folder, of_pattern, one_file
from qlora_jax.data.sources.reading import COMPRESSED, SUFFIXES

__all__ = ["Source", "load_rows", "open_source"]


class Source(Protocol):
    """Rows that are read when they are asked for."""

    @property
    def name(self) -> str: ...
    def rows(self) -> Iterator[Row]:
        """Every row, in order."""
        ...

    def identity(self) -> str:
        """What the rows are, as a hash; "" where that is not known."""
        ...

    def words(self) -> str:
        """What is read and what lies beside it unread, for the log."""
        ...


def open_source(source: str, split: str = "train") -> Source:
    """The rows of `source`, not yet read.

    Args:
        source: a .jsonl, .json (a list of objects, {"data": [...]} or one object on each line) or .parquet file, also
            with .gz, .bz2 or .zst behind it; a folder holding such files, there or below, or written by
            `datasets.save_to_disk`; a pattern with *; or a Hub data set, "org/name" or "org/name:config".
        split: which split of a folder, a pattern or a data set; a single file has no splits.

    Raises:
        FileNotFoundError: nothing is there, or the Hub could not give it.
        ValueError: it is of a kind that is not read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return of_saved(path, split) if is_saved(path) else of_folder(path, split)
    if path.is_file():
        return one_file(path)
    if is_pattern(source):
        return of_pattern(source, split)
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in (*SUFFIXES, *COMPRESSED) and not source.startswith("."):
        return of_hub(source, split)
    raise FileNotFoundError(
        f"no file or folder {source!r} (looked for {path.absolute()}); data is a .jsonl, .json or "
        '.parquet file, a folder of them, or a Hub dataset named "org/name"'
    )


def load_rows(source: str, split: str = "train") -> Sequence[Row]:
    """All rows of `source`, as `open_source` reads them.

    Raises:
        FileNotFoundError: nothing is there, or the Hub could not give it.
        ValueError: it cannot be read as rows, or holds none.
    """
    rows = list(open_source(source, split).rows())
    if not rows:
        raise ValueError(f"{source} holds no rows (split {split!r}); training and evaluation need at least one")
    return rows
