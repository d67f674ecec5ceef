"""Encoded documents on disk, so that a second start over the same rows takes seconds.

The key is everything that the documents follow from; what is kept is read as it lies, without being copied into memory.
"""

import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from qlora_jax.data.documents import Documents
from qlora_jax.data.encoding import Report
from qlora_jax.data.tokenizer import Tokenizer, identity

LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
KEPT = 16  # data sets; the ones used longest ago go
ARRAYS = ("ids", "scored", "starts", "rows")
REPORT = "report.json"
UNFINISHED, LEFT_AFTER = ".new-", 24 * 3600.0  # seconds


def cache_key(assumed: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """The name of the documents that follow from `assumed` (JSON types), the tokenizer and this version of the code.

    None for a slow tokenizer, which does not say all that it is.
    """
    if not tokenizer.is_fast:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    limit = getattr(tokenizer, "model_vocab_size", None)
    whole = [assumed, identity(tokenizer), special, limit, tokenizer.chat_template, _code()]
    return xxhash.xxh3_128(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def load(key: str) -> tuple[Documents, Report] | None:
    """What `store` kept under the key; None where there is nothing whole."""
    folder = _folder() / key
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        report = Report.from_dict(json.loads((folder / REPORT).read_text(encoding="utf-8")))
        os.utime(folder)
    except (OSError, ValueError, TypeError):
        return None
    return Documents(**arrays, chosen=np.arange(len(arrays["rows"]))), report


def store(key: str, documents: Documents, report: Report) -> None:
    """Keeps all the documents, whole or not at all. A disk that is full or may not be written is no error."""
    root = _folder()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = Path(tempfile.mkdtemp(dir=root, prefix=UNFINISHED))
    except OSError:
        return
    try:
        for name in ARRAYS:
            np.save(fresh / f"{name}.npy", getattr(documents, name))
        (fresh / REPORT).write_text(json.dumps(report.to_dict()), encoding="utf-8")
        fresh.replace(root / key)
        _forget_old(root)
    except OSError:  # among them: another run was faster
        shutil.rmtree(fresh, ignore_errors=True)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qlora-jax" / "data"


def _forget_old(root: Path) -> None:
    """Removes what was used longest ago, and what a process that was killed has left half written."""
    used = {path: path.stat().st_mtime for path in root.iterdir()}
    whole = sorted((path for path in used if not path.name.startswith(UNFINISHED)), key=used.__getitem__)
    left = [path for path in used if path.name.startswith(UNFINISHED) and used[path] < time.time() - LEFT_AFTER]
    for path in whole[:-KEPT] + left:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _code() -> list[str]:
    """This folder's source, and the versions of the libraries that rows and text go through."""
    digest = xxhash.xxh3_128()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(f"{name} {version(name)}" for name in LIBRARIES)]
