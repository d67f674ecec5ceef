"""One run at a time in a run folder."""

import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

LOCK = ".lock"

# Folders that this process holds: the system's lock keeps other processes out, not other threads.
_held: set[Path | None] = set()
_held_guard = threading.Lock()


class RunLock:
    """Keeps other processes and threads out of a folder until the block ends, or this process in whatever way.

    The system holds the lock for the process, not for its children, which may outlive it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place: Path | None = None
        self._file: TextIO | None = None

    def take(self) -> None:
        """Takes the lock of the folder, which exists; does nothing where it is taken already.

        Raises:
          ValueError: another process holds it, or another thread of this one.
        """
        if self._file is not None:
            return
        folder = self._folder.resolve()
        with _held_guard:
            # Looked at first: whoever closes the file gives up the lock of the whole process.
            if folder in _held:
                raise ValueError(
                    f"another thread of this process is training in {self._folder}: wait for it, or choose another "
                    "--config.output_dir"
                )
            self._file, self._place = self._locked_file(), folder
            _held.add(folder)

    def _locked_file(self) -> TextIO:
        file = (self._folder / LOCK).open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "unknown"
            file.close()
            raise ValueError(
                f"another process (id {holder}) is training in {self._folder}: wait for it, stop it, or choose another "
                "--config.output_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            with _held_guard:
                self._file.close()
                _held.discard(self._place)
            self._file = self._place = None
