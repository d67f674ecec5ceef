"""Running commands in this process, and looking at what they did to files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes by its path; None for a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def exit_code(main, argv) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def command(sound: Path, out: Path, *more: str) -> list[str]:
    """The arguments of the sound run, with another folder and overrides such as `lora.rank=2`."""
    overrides = [f"--config.{change}" for change in more]
    return ["--config", str(sound / "config.py"), f"--config.output_dir={out}", *overrides]


def edit_tensor(model: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites a tensor of the second shard."""
    tensors = load_file(model / SECOND)
    tensors[Q_PROJ] = change(tensors[Q_PROJ])
    save_file(tensors, model / SECOND, metadata={"format": "pt"})
