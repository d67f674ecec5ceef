"""Which files are data, and of which split."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_jax.data.row import Row
from qlora_jax.data.sources.reading import content_hash, kind_of, rows_of

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "validate", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "heldout", "holdout"),
}
CANONICAL = {word: split for split, words in SPLITS.items() for word in words}
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
MOST_FILES = 10_000  # in a folder and below it
NAMED = 8  # files that a message names


@dataclass(frozen=True, kw_only=True)
class Files:
    """Rows in files, read when they are asked for.

    split: "" where a single file was named. files: those that are read, in order. unread: what lies beside them, with
    the reason.
    """

    name: str
    root: Path
    split: str
    files: Sequence[Path]
    unread: Sequence[str] = ()
    _counts: dict[Path, int] = field(default_factory=dict, init=False, repr=False)

    def rows(self) -> Iterator[Row]:
        for path in self.files:
            self._counts[path] = 0
            for row in rows_of(path, self._shown(path)):
                self._counts[path] += 1
                yield row

    def identity(self) -> str:
        """A hash of the files' names and contents, in their order."""
        return content_hash({self._shown(path): path for path in self.files})

    def words(self) -> str:
        """What is read and what is not, for the log; with the numbers of rows once they are read."""
        counts = {path: f" ({self._counts[path]:,} rows)" if path in self._counts else "" for path in self.files}
        read = _listing([f"{self._shown(path)}{counts[path]}" for path in self.files])
        beside = f"; beside it and not read: {_listing(self.unread)}" if self.unread else ""
        return f"{self.name}, {self.split} split: {read}{beside}" if self.split else f"{self.root}: {read}"

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def one_file(path: Path) -> Files:
    """A file that was named is read whatever its name says."""
    kind_of(path)
    return Files(name=str(path), root=path.parent, split="", files=[path])


def of_folder(folder: Path, split: str) -> Files:
    """The files of a split in a folder and below it. FileNotFoundError where there are none."""
    return _chosen(str(folder), folder, _below(folder), split)


def of_pattern(pattern: str, split: str) -> Files:
    """The files of a split among those that a pattern with * matches. FileNotFoundError where there are none."""
    found = sorted(Path(path) for path in glob.iglob(os.path.expanduser(pattern), recursive=True))
    paths = [path for path in found if path.is_file()]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path(".")
    return _chosen(pattern, root, paths, split)


def is_pattern(source: str) -> bool:
    return glob.has_magic(source)


def split_of(path: Path) -> str | None:
    """The split that a file's own name tells, or else the nearest folder's: "test" of data/my-test.jsonl and of
    test/part-0.jsonl; None where none does."""
    for part in reversed(path.parts):
        words = re.split(r"[-_.\s]+", part.lower())
        named = next((CANONICAL[word] for word in words if word in CANONICAL), None)
        if named:
            return named
    return None


def canonical(split: str) -> str:
    """The split by the one name that all its names share."""
    return CANONICAL.get(split.lower(), split)


def _chosen(name: str, root: Path, paths: Sequence[Path], split: str) -> Files:
    """The files that name the split; for training, where none does, those that name no split at all."""
    wanted = canonical(split)
    data = {path: split_of(path.relative_to(root)) for path in paths if _is_data(path)}
    files = [path for path, its in data.items() if its == wanted or split in path.relative_to(root).parts]
    if not files and wanted == "train":
        files = [path for path, its in data.items() if its is None]
    read = set(files)
    shown = {path: path.relative_to(root).as_posix() for path in paths}
    unread = [f"{shown[path]} ({data.get(path) or _why(path, data)})" for path in paths if path not in read]
    if not files:
        raise FileNotFoundError(
            f"{name}: no files of split {split!r}; a file's name or its folder's says the split (train, validation or "
            f"test), and for training those count that say none; found {_listing(unread) or 'no data files'}"
        )
    return Files(name=name, root=root, split=wanted, files=files, unread=unread)


def _why(path: Path, data: Iterable[Path]) -> str:
    return "names no split" if path in data else "no data file"


def _is_data(path: Path) -> bool:
    try:
        kind_of(path)
    except ValueError:
        return False
    return path.name not in METADATA_FILES


def _below(folder: Path) -> list[Path]:
    walked = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    visible = (path for path in walked if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    paths = list(itertools.islice(visible, MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise ValueError(f"{folder} holds more than {MOST_FILES:,} files: name the folder of the data itself")
    return sorted(paths)


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
