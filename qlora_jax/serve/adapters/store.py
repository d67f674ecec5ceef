"""Adapters from disk to host memory: found by name, told apart by content, read by a thread of their own."""

import collections
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qlora_jax.serve.adapters.catalogue import LONGEST_NAME, Catalogue, is_name
from qlora_jax.serve.adapters.reading import Fingerprint, HostAdapter, Limits, fingerprint, read_checked
from qlora_jax.serve.request import QueueFull, Refused, UnknownModel

# How often an adapter is read that changes while it is being read.
ATTEMPTS = 3


class Version(NamedTuple):
    """An adapter as its files were when a request asked for it."""

    folder: Path
    seen: Fingerprint


class AdapterStore:
    """The adapters of a folder, the last used of them in host memory. Thread-safe.

    Args:
      folder: its subfolders are the adapters; None for a base without any.
      limits: what an adapter must keep to.
      host: how many are kept in host memory. One that a request waits for is never dropped.

    Attributes:
      loads: how many have been read.
      changed: called, on any thread, when one has been read or could not be.

    Raises:
      FileNotFoundError: no such folder.
    """

    def __init__(self, folder: Path | None, limits: Limits, *, host: int):
        self.limits, self.host, self.loads = limits, host, 0
        self.changed: Callable[[], None] = lambda: None
        self._catalogue = None if folder is None else Catalogue(Path(folder))
        self._lock = threading.Condition()
        self._aliases: dict[str, str] = {}
        self._unloaded: set[str] = set()
        self._names: dict[Path, str] = {}
        self._keys: dict[Version, str] = {}
        self._held: dict[str, HostAdapter] = {}  # the least recently used first
        self._failed: dict[Version, Refused] = {}
        self._waiting: collections.Counter[Version] = collections.Counter()
        self._queue: list[Version] = []
        self._closed = False
        self._thread = threading.Thread(target=self._read_queue, name="adapters", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """Every adapter that is served."""
        with self._lock:
            listed = [] if self._catalogue is None else self._catalogue.names()
            return sorted({*listed, *self._aliases} - self._unloaded)

    def want(self, name: str) -> Version:
        """The version of an adapter that a new request gets; to be given back by `release`.

        Raises:
          UnknownModel: no adapter of this name is served.
        """
        with self._lock:
            folder = None if name in self._unloaded else self._folder(self._aliases.get(name, name))
            if folder is None:
                raise UnknownModel(f"no adapter {_shown(name)} is served")
            version = Version(folder, fingerprint(folder))
            self._names[folder] = name
            self._waiting[version] += 1
            return version

    def release(self, version: Version) -> None:
        """The request waits no longer."""
        with self._lock:
            self._waiting[version] -= 1
            if not self._waiting[version]:
                del self._waiting[version]
                self._failed.pop(version, None)
                self._queue = [other for other in self._queue if other != version]
            self._lock.notify_all()

    def key(self, version: Version) -> str | None:
        """The content hash of a version; None before it has been read."""
        with self._lock:
            return self._keys.get(version)

    def get(self, version: Version) -> HostAdapter | None:
        """A wanted adapter; None while it is being read, which begins now.

        Raises:
          Refused: it could not be read, or is not one that can be served.
        """
        with self._lock:
            if version in self._failed:
                raise self._failed[version]
            key = self._keys.get(version)
            if key in self._held:
                self._held[key] = self._held.pop(key)
                return self._held[key]
            if version not in self._queue:
                self._queue.append(version)
                self._lock.notify_all()
            return None

    def load(self, name: str, folder: str | None = None) -> None:
        """Serves the adapter in the subfolder `folder` (`name`'s own where None) as `name`, and reads it at once.

        Raises:
          UnknownModel: no such subfolder.
          ValueError: a name that no adapter may have, or that another one has.
          QueueFull: requests wait for every adapter in host memory.
          Refused: an adapter that cannot be served.
        """
        if not is_name(name):
            raise ValueError(f"{_shown(name)} is no adapter's name: use ASCII letters, digits and '_.-+@'")
        with self._lock:
            place = self._folder(name if folder is None else folder)
            if place is None:
                raise UnknownModel(f"the adapters' folder offers no {_shown(name if folder is None else folder)}")
            if folder is not None and folder != name and self._folder(name) is not None:
                raise ValueError(f"{name!r} is the name of another adapter: choose one that is free")
        version, adapter = self._read(Version(place, fingerprint(place)))
        with self._lock:
            if not self._make_room(adapter.key):
                raise QueueFull(f"adapter {name!r}: all {self.host} places in host memory are in use: try again", 1.0)
            self._take(version, adapter)
            self._unloaded.discard(name)
            self._names[place] = name
            if folder is not None and folder != name:
                self._aliases[name] = folder

    def unload(self, name: str) -> None:
        """Serves `name` to no new request, until it is loaded again. Raises UnknownModel."""
        with self._lock:
            folder = None if name in self._unloaded else self._folder(self._aliases.get(name, name))
            if folder is None:
                raise UnknownModel(f"no adapter {_shown(name)} is served")
            if self._aliases.pop(name, None) is None:
                self._unloaded.add(name)
            key = self._keys.get(Version(folder, fingerprint(folder)))
            if key in self._held and key not in self._wanted():
                del self._held[key]

    def held(self) -> list[tuple[str, HostAdapter]]:
        """Names and adapters in host memory."""
        with self._lock:
            names = {key: self._names.get(version.folder, "") for version, key in self._keys.items()}
            return [(names[key], adapter) for key, adapter in self._held.items()]

    def close(self) -> None:
        """Ends the thread that reads."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    def _folder(self, name: str) -> Path | None:
        return None if self._catalogue is None else self._catalogue.find(name)

    def _read_queue(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or (self._queue and self._make_room(None)))
                if self._closed:
                    return
                version = self._queue[0]
            try:
                found: tuple[Version, HostAdapter] | Refused = self._read(version)
            except Refused as error:
                found = error
            with self._lock:
                self._queue = [other for other in self._queue if other != version]
                if isinstance(found, Refused):
                    if version in self._waiting:
                        self._failed[version] = found
                else:
                    self._take(found[0], found[1])
                    self._keys[version] = found[1].key
            self.changed()

    def _read(self, version: Version) -> tuple[Version, HostAdapter]:
        """The adapter as it is now, and its version, which is a newer one where the files have changed since."""
        name = self._names.get(version.folder, version.folder.name)
        for _ in range(ATTEMPTS):
            before = fingerprint(version.folder)
            adapter = read_checked(name, version.folder, self.limits)
            if fingerprint(version.folder) == before:
                return Version(version.folder, before), adapter
        raise Refused(f"adapter {name!r} changes while it is being read: write it elsewhere and move it here whole")

    def _take(self, version: Version, adapter: HostAdapter) -> None:
        self._keys[version] = adapter.key
        self._held.pop(adapter.key, None)
        self._held[adapter.key] = adapter
        self.loads += 1

    def _make_room(self, key: str | None) -> bool:
        """Drops adapters that no request waits for until there is room for one more."""
        wanted = self._wanted()
        for other in list(self._held):
            if key in self._held or len(self._held) < self.host:
                break
            if other not in wanted:
                del self._held[other]
        return key in self._held or len(self._held) < self.host

    def _wanted(self) -> set[str]:
        return {self._keys[version] for version in self._waiting if version in self._keys}


def _shown(name: str) -> str:
    """A name from a request as an error shows it: quoted, its odd characters escaped, and not at any length."""
    return ascii(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
