"""Adapters from disk to host memory: found by name, told apart by content, read by a thread of their own."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qlora_jax.io.chat_template import Templates, read_chat_template
from qlora_jax.serve.adapters.catalogue import LONGEST_NAME, Catalogue, is_name
from qlora_jax.serve.adapters.known import Known, Version
from qlora_jax.serve.adapters.reading import HostAdapter, Limits, changed_at, check_unread, read_checked
from qlora_jax.serve.request import Refused, UnknownModel

log = logging.getLogger("qlora_jax.serve")
# How often an adapter is read that changes meanwhile; seconds between a failure and the next look, and those in which a
# file system's clock surely goes on.
ATTEMPTS, PAUSE = 5, 0.02


@dataclasses.dataclass(eq=False)
class Want:
    """A request's wish for an adapter: the version that was there when it came, or a newer one, if that was read."""

    version: Version


class AdapterStore:
    """The adapters of a folder, the last used of them in host memory. Thread-safe.

    Args:
      folder: its subfolders are the adapters; None for a base without any.
      limits: what an adapter must keep to.
      host: how many are kept in host memory. One that a request waits for is dropped only once it is on the device.
      base: the base's name, which no adapter may have.

    Attributes:
      loads: how many have been read.
      changed: called, on any thread, when one has been read or could not be.
      on_device: whether the adapter with a content hash is on the device. Asked on any thread.

    Raises:
      FileNotFoundError: no such folder.
    """

    def __init__(self, folder: Path | None, limits: Limits, *, host: int, base: str | None = None):
        self.limits, self.host, self.loads = limits, host, 0
        self.changed: Callable[[], None] = lambda: None
        self.on_device: Callable[[str], bool] = lambda key: False
        self._catalogue = None if folder is None else Catalogue(Path(folder), taken=base)
        self._lock = threading.Condition()
        self._aliases: dict[str, str] = {}
        self._unloaded: set[str] = set()
        self._known = Known()
        self._held: dict[str, HostAdapter] = {}  # the least recently used first
        self._wants: set[Want] = set()
        self._queue: list[Version] = []
        self._closed = False
        self._look_at_all()
        self._thread = threading.Thread(target=self._read_queue, name="adapters", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """Every adapter that is served."""
        # Without the lock: the engine must not wait for a folder to be listed.
        listed = [] if self._catalogue is None else self._catalogue.names()
        with self._lock:
            return sorted({*listed, *self._aliases} - self._unloaded)

    def broken(self) -> dict[str, str]:
        """What lies in the folder and cannot be served, by name, with the reason."""
        left_out = {} if self._catalogue is None else self._catalogue.left_out()
        with self._lock:
            return left_out | self._known.broken()

    def want(self, name: str) -> Want:
        """A new request's wish for an adapter; to be given back by `release`.

        Raises:
          UnknownModel: no adapter of this name is served.
        """
        with self._lock:
            folder = self._served(name)
            want = Want(Version.of(folder))
            self._known.names[folder] = name
            self._wants.add(want)
            return want

    def chat_template(self, name: str) -> Templates | None:
        """What the adapter's folder says that chats were rendered with; None where it is silent or not served.

        Raises:
          ValueError: a template that cannot be read.
        """
        with self._lock:
            folder = self._place(name)
        return None if folder is None else read_chat_template(folder, root=folder)

    def release(self, want: Want) -> None:
        """The request waits no longer."""
        with self._lock:
            self._wants.remove(want)
            left = self._wanted_versions()
            self._known.forget_passing(left)
            self._queue = [version for version in self._queue if version in left]
            self._lock.notify_all()

    def key(self, want: Want) -> str | None:
        """The content hash of a wanted adapter; None before it has been read."""
        with self._lock:
            return self._known.key(want.version)

    def get(self, want: Want) -> HostAdapter | None:
        """A wanted adapter; None while it is being read, which begins now.

        Raises:
          Refused: it could not be read, or is not one that can be served.
        """
        with self._lock:
            version = want.version
            if refusal := self._known.refusal(version):
                raise refusal
            key = self._known.key(version)
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
                raise self._unknown("the adapters' folder offers no {}", name if folder is None else folder)
            if folder is not None and folder != name and self._folder(name) is not None:
                raise ValueError(f"{name!r} is the name of another adapter: choose one that is free")
            self._known.names[place] = name
        version, adapter = self._read(Version.of(place))
        with self._lock:
            if self._make_room(adapter.key):  # else it is read again when someone asks for it
                self._take(version, adapter)
            self._unloaded.discard(name)
            if folder is not None and folder != name:
                self._aliases[name] = folder

    def unload(self, name: str) -> None:
        """Serves `name` to no new request, until it is loaded again. Raises UnknownModel."""
        with self._lock:
            folder = self._served(name)
            if self._aliases.pop(name, None) is None:
                self._unloaded.add(name)
            key = self._known.key(Version.of(folder))
            if key in self._held and key not in self._needed():
                del self._held[key]

    def held(self) -> list[tuple[str, HostAdapter]]:
        """Names and adapters in host memory."""
        with self._lock:
            return [(self._known.name_of_key(key), adapter) for key, adapter in self._held.items()]

    def close(self) -> None:
        """Ends the thread that reads."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    def _folder(self, name: str) -> Path | None:
        return None if self._catalogue is None else self._catalogue.find(name)

    def _place(self, name: str) -> Path | None:
        """The folder that is served under a name, if any is."""
        return None if name in self._unloaded else self._folder(self._aliases.get(name, name))

    def _served(self, name: str) -> Path:
        folder = self._place(name)
        if folder is None:
            raise self._unknown("no adapter {} is served", name)
        return folder

    def _unknown(self, words: str, name: str) -> UnknownModel:
        reason = None if self._catalogue is None else self._catalogue.fault(name)
        words = words.format(_shown(name))
        return UnknownModel(words if reason is None else f"{words} ({reason})", reason)

    def _look_at_all(self) -> None:
        """Logs which adapters cannot be served as they are, before anybody asks for them."""
        catalogue = self._catalogue
        places = {} if catalogue is None else {name: catalogue.find(name) for name in catalogue.names()}
        for name, folder in places.items():
            if folder is None:  # gone meanwhile
                continue
            version = Version.of(folder)
            try:
                check_unread(name, folder, self.limits)
            except Refused as error:
                log.warning(f"not served as it is: {error}")
                self._known.learn(version, error, set())

    def _read_queue(self) -> None:
        while True:
            try:
                if not self._read_next():
                    return
                self.changed()
            except Exception:  # without this thread no adapter would ever be read again
                log.exception("The thread that reads adapters goes on")
                time.sleep(PAUSE)

    def _read_next(self) -> bool:
        """Waits for a version that is wanted and has room, and reads it; False at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._closed or (self._queue and self._make_room(None)))
            if self._closed:
                return False
            version = self._queue[0]
            # Who comes later wants what is there later, even if that is this version again.
            asking = [want for want in self._wants if want.version == version]
        try:
            found: tuple[Version, HostAdapter] | Refused = self._read(version)
        except Refused as error:
            found = error
        except Exception as error:
            log.exception("Reading an adapter failed in a way that was not expected")
            found = Refused(f"it could not be read ({type(error).__name__}: {error})")
        with self._lock:
            self._queue = [other for other in self._queue if other != version]
            if isinstance(found, Refused):
                self._known.learn(version, found, self._wanted_versions())
            else:
                self._take(*found)
                for want in asking:
                    want.version = found[0]
        return True

    def _read(self, version: Version) -> tuple[Version, HostAdapter]:
        """The adapter as it is now, and its version, which is a newer one where the files have changed since."""
        name = self._known.names.get(version.folder, version.folder.name)
        found: HostAdapter | Refused
        for _ in range(ATTEMPTS):
            before = Version.of(version.folder)
            if 0 <= time.time() - changed_at(before.seen) < PAUSE:
                # Written over once more in the same tick of the file system's clock, it would look the same.
                time.sleep(PAUSE)
            try:
                found = read_checked(name, version.folder, self.limits)
            except Refused as error:
                found = error
                time.sleep(PAUSE)  # a folder that is being replaced is away for a moment
            if Version.of(version.folder) == before:
                if isinstance(found, Refused):
                    raise found
                return before, found
        raise Refused(f"adapter {name!r} changes while it is being read: write it elsewhere and move it here whole")

    def _take(self, version: Version, adapter: HostAdapter) -> None:
        self._known.learn(version, adapter.key, self._wanted_versions())
        self._held.pop(adapter.key, None)
        self._held[adapter.key] = adapter
        self.loads += 1

    def _make_room(self, key: str | None) -> bool:
        """Drops adapters that no request waits for until there is room for one more."""
        needed = self._needed()
        for other in list(self._held):
            if key in self._held or len(self._held) < self.host:
                break
            if other not in needed:
                del self._held[other]
        return key in self._held or len(self._held) < self.host

    def _wanted_versions(self) -> set[Version]:
        return {want.version for want in self._wants}

    def _needed(self) -> set[str]:
        """What requests wait for that is not on the device.

        What is there needs no place here: an adapter that is asked for all the time would keep the others out.
        """
        keys = (self._known.key(version) for version in self._wanted_versions())
        return {key for key in keys if key is not None and not self.on_device(key)}


def _shown(name: str) -> str:
    """A name from a request as an error shows it: quoted, its odd characters escaped, and not at any length."""
    return ascii(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
