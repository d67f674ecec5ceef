"""Writing a folder so that it appears complete or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(out: str | Path, *, needed: int, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Gives a temporary sibling of `out` to write into; it becomes `out` when the block ends without error.

    Args:
      out: absent, empty, or holding nothing but files named in `replaceable`, which are then replaced.
      needed: bytes that will be written.

    Raises:
      FileExistsError: `out` is a file, or holds something else.
      OSError: too little room on the disk (ENOSPC), before or while writing; nothing is left behind.
    """
    out = Path(out)
    _refuse_occupied(out, replaceable)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < needed:
        raise _disk_full(out, needed)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _disk_full(out, needed) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_occupied(out: Path, replaceable: Collection[str]) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a new or empty folder")
    other = sorted({file.name for file in out.iterdir()} - set(replaceable)) if out.is_dir() else []
    if other:
        raise FileExistsError(f"{out} is not empty (it holds {other[0]!r}): give a new or empty folder")


def _put_in_place(partial: Path, out: Path) -> None:
    """Renames; a folder that is replaced stays whole until the new one is there."""
    if not out.exists():
        os.replace(partial, out)
        return
    old = partial.with_suffix(".old")
    os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old)


def _disk_full(out: Path, needed: int) -> OSError:
    free = shutil.disk_usage(out.parent).free
    message = f"{out} needs {needed:,} bytes, its disk has {free:,} free: free some, or choose another folder"
    return OSError(errno.ENOSPC, message)
