"""Adapters from disk to host memory: found by name, told apart by content, read by a thread of their own."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qlora_jax.serve.adapters.catalogue import LONGEST_NAME, Catalogue, is_name
from qlora_jax.serve.adapters.reading import Fingerprint, HostAdapter, Limits, fingerprint, read_checked
from qlora_jax.serve.request import Refused, UnknownModel

# How often an adapter is read that changes meanwhile, and seconds between a failure and the next look.
ATTEMPTS, PAUSE = 5, 0.02


class Version(NamedTuple):
    """An adapter as its files were at one moment."""

    folder: Path
    seen: Fingerprint


@dataclasses.dataclass(eq=False)
class Want:
    """A request's wish for an adapter: the version that was there when it came, or a newer one, if that was read."""

    version: Version


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
        self._wants: set[Want] = set()
        self._queue: list[Version] = []
        self._closed = False
        self._thread = threading.Thread(target=self._read_queue, name="adapters", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """Every adapter that is served."""
        # Without the lock: the engine must not wait for a folder to be listed.
        listed = [] if self._catalogue is None else self._catalogue.names()
        with self._lock:
            return sorted({*listed, *self._aliases} - self._unloaded)

    def want(self, name: str) -> Want:
        """A new request's wish for an adapter; to be given back by `release`.

        Raises:
          UnknownModel: no adapter of this name is served.
        """
        with self._lock:
            folder = None if name in self._unloaded else self._folder(self._aliases.get(name, name))
            if folder is None:
                raise UnknownModel(f"no adapter {_shown(name)} is served")
            want = Want(Version(folder, fingerprint(folder)))
            self._names[folder] = name
            self._wants.add(want)
            return want

    def release(self, want: Want) -> None:
        """The request waits no longer."""
        with self._lock:
            self._wants.remove(want)
            left = {other.version for other in self._wants}
            self._failed = {version: error for version, error in self._failed.items() if version in left}
            self._queue = [version for version in self._queue if version in left]
            self._lock.notify_all()

    def key(self, want: Want) -> str | None:
        """The content hash of a wanted adapter; None before it has been read."""
        with self._lock:
            return self._keys.get(want.version)

    def get(self, want: Want) -> HostAdapter | None:
        """A wanted adapter; None while it is being read, which begins now.

        Raises:
          Refused: it could not be read, or is not one that can be served.
        """
        with self._lock:
            version = want.version
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
            if self._make_room(adapter.key):  # else it is read again when someone asks for it
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
                # Who comes later wants what is there later, even if that is this version again.
                asking = [want for want in self._wants if want.version == version]
            try:
                found: tuple[Version, HostAdapter] | Refused = self._read(version)
            except Refused as error:
                found = error
            with self._lock:
                self._queue = [other for other in self._queue if other != version]
                if isinstance(found, Refused):
                    self._failed[version] = found
                else:
                    self._take(*found)
                    for want in asking:
                        want.version = found[0]
            self.changed()

    def _read(self, version: Version) -> tuple[Version, HostAdapter]:
        """The adapter as it is now, and its version, which is a newer one where the files have changed since."""
        name = self._names.get(version.folder, version.folder.name)
        found: HostAdapter | Refused
        for _ in range(ATTEMPTS):
            before = fingerprint(version.folder)
            try:
                found = read_checked(name, version.folder, self.limits)
            except Refused as error:
                found = error
                time.sleep(PAUSE)  # a folder that is being replaced is away for a moment
            if fingerprint(version.folder) == before:
                if isinstance(found, Refused):
                    raise found
                return Version(version.folder, before), found
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
        return {self._keys[want.version] for want in self._wants if want.version in self._keys}


def _shown(name: str) -> str:
    """A name from a request as an error shows it: quoted, its odd characters escaped, and not at any length."""
    return ascii(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
