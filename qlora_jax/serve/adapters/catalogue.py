"""Which adapters a folder offers. A name is looked up among those that are listed; none ever becomes a path."""

import logging
import os
import re
import time
import unicodedata
from pathlib import Path

from qlora_jax.io.identity import RECORD
from qlora_jax.io.peft import PICKLE, WEIGHTS
from qlora_jax.io.peft_config import CONFIG

log = logging.getLogger("qlora_jax.serve")
NAME = re.compile(r"[^\W_][\w.@+-]*", re.ASCII)
LONGEST_NAME = 128
FRESH = 1.0


class Catalogue:
    """The adapters in a folder: its subfolders with an adapter's two files, by name.

    A subfolder is left out where its name is no plain one (`is_name`) or `taken`, or where it or a file of it is a link
    that leads out of the folder; the log says so once for each, with the reason.

    Args:
      taken: the base's name, which no adapter may have.

    Raises:
      FileNotFoundError: no such folder.
    """

    def __init__(self, folder: Path, *, taken: str | None = None):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give one whose subfolders are adapters")
        self.folder, self.taken = folder.resolve(), taken
        self._seen: int | None = None
        self._found: dict[str, Path] = {}
        self._listed: list[str] = []
        self._left_out: dict[str, str] = {}
        self._logged: dict[str, str] = {}
        self._listed_until = 0.0

    def find(self, name: str) -> Path | None:
        """The folder of an adapter; None where none of this name is offered."""
        place = self._entries().get(name)
        return place if place and self._fault(name, place) is None else None

    def fault(self, name: str) -> str | None:
        """Why what lies there under this name is not offered; None where it is offered, or nothing lies there."""
        place = self._entries().get(name)
        return None if place is None else self._fault(name, place)

    def names(self) -> list[str]:
        """Every adapter, in order; at most FRESH seconds old, as thousands take a while to look at."""
        self._list()
        return list(self._listed)

    def left_out(self) -> dict[str, str]:
        """The subfolders that are not offered, with the reason; as old as `names`."""
        self._list()
        return dict(self._left_out)

    def _list(self) -> None:
        entries = self._entries()
        if time.monotonic() < self._listed_until:
            return
        faults = {name: self._fault(name, place) for name, place in entries.items()}
        self._listed = [name for name, fault in faults.items() if fault is None]
        self._left_out = {name: fault for name, fault in faults.items() if fault is not None}
        self._listed_until = time.monotonic() + FRESH
        for name, fault in self._left_out.items():
            if self._logged.get(name) != fault:
                log.warning(f"the folder {ascii(name)} is not served: {fault}")
        self._logged = dict(self._left_out)

    def _entries(self) -> dict[str, Path]:
        """The subfolders, and links that may lead to one; they are listed again when the folder has changed.

        What begins with a dot is somebody's own business, and no folder of adapters.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed != self._seen:
                with os.scandir(self.folder) as entries:
                    names = (e.name for e in entries if e.name[:1] != "." and (e.is_symlink() or e.is_dir()))
                    self._found = {name: self.folder / name for name in sorted(names)}
                self._seen, self._listed_until = changed, 0.0
        except OSError as error:
            if self._seen is not None:
                log.error(f"the adapters' folder cannot be listed: {error.strerror}")
            self._found, self._seen, self._listed_until = {}, None, 0.0
        return self._found

    def _fault(self, name: str, folder: Path) -> str | None:
        if not is_name(name):
            return "adapters' names are ASCII letters, digits and _.-+@: give it another name"
        if name == self.taken:
            return "the base is called so: give it another name"
        return fault_of(folder, self.folder)


def fault_of(folder: Path, root: Path) -> str | None:
    """Why `folder`, a place in `root`, is no adapter's; None where its files are in `root`, links followed."""
    files = [folder / CONFIG, folder / WEIGHTS]
    try:
        places = [folder, *files, folder / RECORD]
        # Thousands are listed: where nothing is a link, nothing has to be followed.
        if any(os.path.islink(place) for place in places):
            outside = [place.name for place in places if root not in place.resolve(strict=False).parents]
            if outside:
                return f"{outside[0]!r} is a link that leads out of the adapters' folder: put the adapter itself there"
        absent = [file.name for file in files if not os.path.isfile(file)]
    except (OSError, RuntimeError) as error:  # what may not be read, and links that go round in circles
        return f"it cannot be read ({error})".replace(f"{root}/", "")
    if absent and WEIGHTS in absent and os.path.isfile(folder / PICKLE):
        return f"{PICKLE} is a pickle, which can run code when it is read: save the adapter again as {WEIGHTS}"
    return f"it holds no file {absent[0]} (subfolders of it are not looked at)" if absent else None


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: ASCII letters, digits and `_ . - + @`, a letter or digit first.

    Other alphabets are left out because two different names can look alike there, or be equal only after normalization.
    """
    plain = unicodedata.normalize("NFKC", name) == name
    return len(name) <= LONGEST_NAME and plain and NAME.fullmatch(name) is not None
