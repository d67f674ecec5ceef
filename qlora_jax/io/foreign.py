"""Folders of other kinds than a 16- or 32-bit, or bitsandbytes 4-bit, checkpoint: named for what they are."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ORIGINAL = "give the folder of the original 16-bit weights (--quant nf4 and training pack them)"
# Methods that `quantization_config.quant_method` names, as their projects spell them.
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "torchao": "torchao",
    "modelopt": "ModelOpt",
}
# Names of tensors by their last part, for folders whose config.json says nothing.
SUFFIXES = {
    "qweight": "GPTQ or AWQ",
    "weight_scale_inv": "FP8",
    "weight_packed": "compressed-tensors",
    "SCB": "bitsandbytes int8",
    "scales": "MLX",
    "weight_scale": "FP8 or int8",
}
# Weights in files of other kinds, by their suffix.
FILES = {
    ".gguf": "GGUF files for llama.cpp",
    ".bin": "pickled PyTorch weights",
    ".pth": "pickled PyTorch weights",
    ".pt": "pickled PyTorch weights",
    ".ckpt": "pickled PyTorch weights",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
    ".onnx": "ONNX files",
    ".npz": "MLX weights of old",
}
PICKLED = "convert them to safetensors first (save_pretrained does)"


def check_own_format(folder: Path) -> None:
    """Refuses a folder that is something else by its files' names or its config.json.

    Raises:
      ValueError: an adapter, a run of train.py.
      NotImplementedError: weights in another quantization.
    """
    if (folder / "config.json").exists():
        quantization = _quantization(folder / "config.json")
        if quantization:
            raise NotImplementedError(f"{folder} is quantized with {quantization}, which is not read: {ORIGINAL}")
        if (folder / "checkpoints").is_dir() and (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} is a run of train.py, no model: give its adapter subfolder as --adapter, or export it"
            )
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(_adapter_words(folder))
    if any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} holds {FILES['.gguf']} only: {ORIGINAL}")


def adapter_elsewhere(folder: Path) -> str | None:
    """What a folder without a PEFT adapter holds instead, and the next step; None where there is nothing to name."""
    if (folder / "adapters.safetensors").exists():
        return f"{folder} is an adapter of MLX's, which is not read: convert it to PEFT's format"
    if (folder / "adapter" / "adapter_config.json").exists():
        return f"{folder} is a run of train.py: give {folder / 'adapter'}"
    if (folder / "config.json").exists():
        return f"{folder} is a model, no adapter: give it as --model"
    if any(folder.glob("*.gguf")):
        return f"{folder} holds {FILES['.gguf']}, no adapter of PEFT's: give the adapter that they were made of"
    return None


def other_weights(folder: Path) -> str | None:
    """What a folder without safetensors holds instead, and the next step; None where there is nothing to name."""
    if (folder / "adapter_config.json").exists():
        return _adapter_words(folder)
    names = {suffix for path in folder.iterdir() if (suffix := path.suffix) in FILES}
    for suffix in sorted(names, key=list(FILES).index):
        step = PICKLED if "pickled" in FILES[suffix] else ORIGINAL
        return f"{folder} holds {FILES[suffix]} only: {step}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{folder} holds {others[0]!r}, expected model.safetensors or model.safetensors.index.json: rename it"
    return None


def quantized_names(names: Iterable[str]) -> str | None:
    """The quantization that a checkpoint's tensor names give away; None for none."""
    found = {name.rsplit(".", 1)[-1] for name in names}
    return next((method for suffix, method in SUFFIXES.items() if suffix in found), None)


def _quantization(file: Path) -> str | None:
    """Another quantization than bitsandbytes' 4-bit that config.json names."""
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None  # read_config says it
    if not isinstance(settings, dict):
        return None
    stated: Any = settings.get("quantization_config") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"{file}: quantization_config is {stated!r}, expected an object")
    method = stated.get("quant_method")
    if settings.get("quantization") or (stated and method is None and "bits" in stated):
        return "MLX"
    if method == "mxfp4":
        return None
    if method == "bitsandbytes":
        return "bitsandbytes int8" if stated.get("load_in_8bit") or stated.get("_load_in_8bit") else None
    return None if method is None else METHODS.get(method, repr(method)) if isinstance(method, str) else repr(method)


def _adapter_words(folder: Path) -> str:
    return (
        f"{folder} is an adapter, no model: give the model that it was trained on{_base_of(folder)} and this folder as "
        f"--adapter"
    )


def _base_of(folder: Path) -> str:
    """The base's name in parentheses, where the adapter tells it."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f" ({base})" if isinstance(base, str) and base else ""
