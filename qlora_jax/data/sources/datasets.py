"""Rows of the datasets library: folders that it saved, and data sets of the Hub."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.data.row import Row
from qlora_jax.data.sources.files import canonical
from qlora_jax.data.sources.reading import without_nulls

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Rows that the datasets library holds."""

    name: str
    split: str
    dataset: Iterable[Mapping[str, Any]]
    unread: tuple[str, ...] = ()

    def rows(self) -> Iterator[Row]:
        shown = Path(self.name).name if Path(self.name).is_dir() else self.name
        for number, values in enumerate(self.dataset, start=1):
            yield Row(values=without_nulls(values), origin=f"{shown}, row {number}")

    def identity(self) -> str:
        """The library's own fingerprint of the rows; "" where it has none."""
        return getattr(self.dataset, "_fingerprint", "")

    def words(self) -> str:
        """What is read and what is not, for the log."""
        beside = f"; not read: the splits {', '.join(self.unread)}" if self.unread else ""
        count = f" ({len(self.dataset):,} rows)" if isinstance(self.dataset, Sized) else ""
        return f"{self.name}, {self.split} split{count}{beside}"


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def of_saved(folder: Path, split: str) -> Saved:
    """A folder that the library saved. ValueError where it lacks the split."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return Saved(name=str(folder), split="the only one", dataset=saved)
    named = next((name for name in saved if canonical(name) == canonical(split)), None)
    if named is None:
        raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(saved)}")
    return Saved(name=str(folder), split=named, dataset=saved[named], unread=tuple(n for n in saved if n != named))


def of_hub(source: str, split: str) -> Saved:
    """A data set of the Hub, "org/name" or "org/name:config".

    Raises:
        FileNotFoundError: the Hub could not give it.
        ValueError: it has no such split or configuration.
    """
    import datasets

    name, _, config = source.partition(":")
    try:
        try:
            dataset = datasets.load_dataset(name, config or None, split=split)
        except ValueError:  # an unknown split, among others
            split = _own_name(name, config or None, split)
            dataset = datasets.load_dataset(name, config or None, split=split)
    except OSError as error:  # offline, absent, private and gated alike
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and the Hugging Face Hub did not give it ({error}); "
            "check the name and the connection, or pass a local .jsonl, .json or .parquet file or a folder "
            "of them"
        ) from error
    except ValueError as error:  # an unknown config or split; the library's text lists the known ones
        raise ValueError(f"Hub dataset {source!r}, split {split!r}: {error}") from error
    return Saved(name=source, split=split, dataset=dataset)


def _own_name(name: str, config: str | None, split: str) -> str:
    """The data set's own name for the split: some call their validation "dev"."""
    import datasets

    held = datasets.get_dataset_split_names(name, config)
    return next((one for one in held if canonical(one) == canonical(split)), split)
