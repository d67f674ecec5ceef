"""One process at a time in a run folder."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

LOCK = ".lock"


class RunLock:
    """Keeps other processes out of a folder until the block ends, or this process in whatever way.

    The system holds the lock for the process, not for its children, which may outlive it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def take(self) -> None:
        """Takes the lock of the folder, which exists; does nothing where it is taken already.

        Raises:
          ValueError: another process holds it.
        """
        if self._file is not None:
            return
        file = (self._folder / LOCK).open("a+")  # noqa: SIM115 (open until the end)
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
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None
