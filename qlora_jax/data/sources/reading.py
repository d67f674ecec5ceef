"""The rows of one file: JSONL, JSON or Parquet, also compressed.

A row that is no JSON object is a row with a problem; what becomes of it is decided where rows are encoded."""

import bz2
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from qlora_jax.data.row import Row

COMPRESSED = (".gz", ".bz2", ".zst")
READ_AT_ONCE = 1 << 20  # bytes


def kind_of(path: Path) -> str:
    """The file's format by its name, without the suffix of a compression. ValueError for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise ValueError(f"{path}: unknown file type {kind!r}; expected one of {', '.join(SUFFIXES)}")
    return kind


def rows_of(path: Path, name: str) -> Iterator[Row]:
    """The file's rows, which messages name by `name` and their number.

    Raises:
        ValueError: the file is damaged, or holds no rows at all.
    """
    try:
        yield from READERS[kind_of(path)](path, name)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def content_hash(paths: Mapping[str, Path]) -> str:
    """A hash of the files' names, which messages about rows have, and of their bytes, in their order."""
    digest = xxhash.xxh3_128()
    for name, path in paths.items():
        digest.update(f"{name}\0".encode())
        with path.open("rb") as file:
            while block := file.read(READ_AT_ONCE):
                digest.update(block)

    return digest.hexdigest()


def without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all rows: those that hold null were not in this one."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _opened(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]
    return path.open("rb")


def _lines(path: Path, name: str) -> Iterator[Row]:
    """One object on each line. Only a line feed ends one: JSON strings may hold U+2028 and its like."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            origin = f"{name}, row {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parsed(line, origin)


def _parsed(line: bytes, origin: str) -> Row:
    try:
        return _row(json.loads(line.rstrip(b"\r\n").decode("utf-8")), origin)
    except UnicodeDecodeError as error:
        return _problem(origin, f"not UTF-8 text at byte {error.start}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return _problem(origin, f"not valid JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return _problem(origin, "not valid JSON: nested too deeply")


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, Mapping):
        return _problem(origin, f"expected a JSON object of columns, found {type(value).__name__} {value!r:.60}")
    return Row(values=value, origin=origin)


def _problem(origin: str, problem: str) -> Row:
    return Row(values={}, origin=origin, problem=problem)


def _json(path: Path, name: str) -> Iterator[Row]:
    """A list of objects, {"data": [...]}, or, as many files named .json are, one object on each line."""
    with _opened(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _lines(path, name)
            return
        raise ValueError(f"{name}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not valid JSON: nested too deeply") from error
    if isinstance(value, Mapping) and isinstance(value.get("data"), list):
        value = value["data"]
    items = value if isinstance(value, list) else [value]
    yield from (_row(item, f"{name}, row {number}") for number, item in enumerate(items, start=1))


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(values=without_nulls(values), origin=f"{name}, row {number}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
}
SUFFIXES = tuple(READERS)
