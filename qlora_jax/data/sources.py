"""Rows from wherever they lie: a JSONL, JSON or Parquet file, a folder of those, or a Hub dataset."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as stored. `origin` is for messages: "train.jsonl, row 17" (rows and lines count from 1)."""

    values: Mapping[str, Any]
    origin: str


def load_rows(source: str, split: str = "train") -> Sequence[Row]:
    """All rows of `source`.

    Args:
        source: a .jsonl, .json (a list of objects, or {"data": [...]}) or .parquet file; a folder holding
            such files or written by `datasets.save_to_disk`; or a Hub dataset, "org/name" or
            "org/name:config".
        split: which split of a folder or a Hub dataset; a single file has no splits.

    Raises:
        FileNotFoundError: nothing is there, or the Hub could not give it.
        ValueError: it cannot be read as rows, or holds none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _folder_rows(path, split)
    elif path.is_file():
        rows = _file_rows(path)
    elif HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES and not source.startswith("."):
        rows = _hub_rows(source, split)
    else:
        raise FileNotFoundError(
            f"no file or folder {source!r} (looked for {path.absolute()}); data is a .jsonl, .json or "
            '.parquet file, a folder of them, or a Hub dataset named "org/name"'
        )
    if not rows:
        raise ValueError(f"{source} holds no rows (split {split!r}); training and evaluation need at least one")
    return rows


def _file_rows(path: Path) -> list[Row]:
    match path.suffix:
        case ".jsonl":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path)
        case ".parquet":
            return _parquet_rows([path])
    raise ValueError(f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")


def _jsonl_rows(path: Path) -> list[Row]:
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and its like.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    named = [(line, f"{path.name}, row {n}") for n, line in lines if line.strip()]
    return [_object(_parse(line, origin), origin) for line, origin in named]


def _json_rows(path: Path) -> list[Row]:
    content = _parse(_read_text(path), path.name)
    if isinstance(content, Mapping):
        content = content.get("data")
    if not isinstance(content, list):
        raise ValueError(
            f'{path.name}: expected a list of objects or {{"data": [...]}}; a file of one object per line is '
            "named .jsonl"
        )
    return [_object(value, f"{path.name}, row {n}") for n, value in enumerate(content, start=1)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        # datasets' to_json writes one object per line and many name such a file .json
        hint = "; a file of one object per line is named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{origin}: not valid JSON at {place}: {error.msg}{hint}") from error


def _object(value: Any, origin: str) -> Row:
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise ValueError(f"{origin}: expected a JSON object of columns, found {kind} {value!r:.60}")
    return Row(values=value, origin=origin)


def _parquet_rows(paths: Sequence[Path]) -> list[Row]:
    import datasets

    return [
        row
        for path in paths
        for row in _numbered(datasets.Dataset.from_parquet(str(path), keep_in_memory=True), path.name)
    ]


def _numbered(values: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    return [Row(values=value, origin=f"{name}, row {n}") for n, value in enumerate(values, start=1)]


def _folder_rows(folder: Path, split: str) -> list[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split)
    files = sorted(f for d in (folder, folder / "data") for f in d.glob("*") if f.suffix in SUFFIXES)
    files = [f for f in files if f.name not in METADATA_FILES]
    splits = {f: re.split(r"[-_.]", f.name)[0] for f in files}  # "test" of test-00000-of-00002.parquet
    chosen = [f for f in files if splits[f] == split]
    if split == "train" and not set(splits.values()) & set(SPLIT_NAMES):
        chosen = files  # files that name no split at all are training data
    if not chosen:
        held = ", ".join(f.name for f in files) or "no data files"
        raise FileNotFoundError(
            f"{folder}: no files of split {split!r}; looked for {split}.jsonl, {split}.json, {split}.parquet "
            f"and {split}-*.parquet, there and in data/; found {held}"
        )
    return [row for file in chosen for row in _file_rows(file)]


def _saved_rows(folder: Path, split: str) -> list[Row]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    return _numbered(saved, folder.name)


def _hub_rows(source: str, split: str) -> list[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        return _numbered(datasets.load_dataset(name, config or None, split=split), source)
    except OSError as error:  # offline, absent, private and gated alike
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and the Hugging Face Hub did not give it ({error}); "
            "check the name and the connection, or pass a local .jsonl, .json or .parquet file or a folder "
            "of them"
        ) from error
    except ValueError as error:  # an unknown config or split; the library's text lists the known ones
        raise ValueError(f"Hub dataset {source!r}, split {split!r}: {error}") from error
