"""Which adapters a folder offers. A name is looked up among those that are listed; none ever becomes a path."""

import os
import re
import time
import unicodedata
from pathlib import Path

from qlora_jax.io.identity import RECORD
from qlora_jax.io.peft import WEIGHTS
from qlora_jax.io.peft_config import CONFIG

NAME = re.compile(r"[^\W_][\w.@+-]*", re.ASCII)
LONGEST_NAME = 128
FRESH = 1.0


class Catalogue:
    """The adapters in a folder: its subfolders with an adapter's two files, by name.

    A subfolder is left out where its name is no plain one (`is_name`), or where it or a file of it is a link that leads
    out of the folder.

    Raises:
      FileNotFoundError: no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give one whose subfolders are adapters")
        self.folder = folder.resolve()
        self._seen: int | None = None
        self._found: dict[str, Path] = {}
        self._listed: list[str] = []
        self._listed_until = 0.0

    def find(self, name: str) -> Path | None:
        """The folder of an adapter; None where none of this name is offered."""
        place = self._entries().get(name)
        return place if place and offers(place, self.folder) else None

    def names(self) -> list[str]:
        """Every adapter, in order; at most FRESH seconds old, as thousands take a while to look at."""
        if time.monotonic() >= self._listed_until or self.folder.stat().st_mtime_ns != self._seen:
            self._listed = [name for name, place in self._entries().items() if offers(place, self.folder)]
            self._listed_until = time.monotonic() + FRESH
        return list(self._listed)

    def _entries(self) -> dict[str, Path]:
        """What lies in the folder under a plain name; it is listed again when the folder has changed."""
        changed = self.folder.stat().st_mtime_ns
        if changed != self._seen:
            with os.scandir(self.folder) as entries:
                found = {entry.name: Path(entry.path) for entry in entries if is_name(entry.name)}
            self._found, self._seen = dict(sorted(found.items())), changed
        return self._found


def offers(folder: Path, root: Path) -> bool:
    """Whether `folder`, a place in `root`, holds an adapter's two files, all of them in `root` with links followed."""
    files = [folder / CONFIG, folder / WEIGHTS]
    try:
        # Thousands are listed: where nothing is a link, nothing has to be followed.
        if not any(os.path.islink(place) for place in (folder, *files, folder / RECORD)):
            return all(os.path.isfile(file) for file in files)
        places = [place.resolve() for place in (folder, *files, folder / RECORD)]
        return all(file.is_file() for file in files) and all(root in place.parents for place in places)
    except (OSError, RuntimeError):  # what may not be read, and links that go round in circles
        return False


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: ASCII letters, digits and `_ . - + @`, a letter or digit first.

    Other alphabets are left out because two different names can look alike there, or be equal only after normalization.
    """
    plain = unicodedata.normalize("NFKC", name) == name
    return len(name) <= LONGEST_NAME and plain and NAME.fullmatch(name) is not None
