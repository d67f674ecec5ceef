"""The tensors of a PEFT adapter's file by the modules that they belong to."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.lora.adapter import Adapter

PREFIX = "base_model.model."
# torch.compile and sharding wrap modules, and some scripts save the adapter's name in every key.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
WHOLE = re.compile(r"(?P<module>(.+\.)?(lm_head|embed_tokens))(\.base_layer)?\.weight")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))


def keys_of(module: str, parts: Any, kind: type[Adapter]) -> dict[str, np.ndarray]:
    """One module's arrays by the keys that PEFT's file has for them."""
    values = parts._asdict()
    return {f"{PREFIX}{module}.{name.stem}{name.ending}": values[part] for part, name in kind.NAMES.items()}


def parts_of(
    file: Path, tensors: Mapping[str, np.ndarray], base: TensorFolder | None, kind: type[Adapter]
) -> dict[str, Any]:
    """The arrays of each module (`kind.Parts`), in the order of the modules' names.

    PEFT saves the embedding and the output layer whole where they are adapted or resized. These are left out where they
    are the base's own.

    Raises:
      ValueError: no tensors, several adapters, or an array that has no counterpart, is of another kind or not finite.
      NotImplementedError: other tensors than those of linear layers' adapters, or another embedding than the base's.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    adapters = set()
    for key, value in sorted(tensors.items()):
        place = _place(_unwrapped(key), kind)
        if place is None:
            _check_whole(file, key, value, base)
            continue
        _check_values(file, key, value, kind.NAMES[place.part].axes)
        own = found.setdefault(place.module, {})
        if place.part in own:
            stem = kind.NAMES[place.part].stem
            raise ValueError(f"{file} holds {stem} of {place.module!r} twice: save the adapter again")
        own[place.part] = value.astype(np.float32) if value.dtype == np.float64 else value
        adapters.add(place.adapter)
    if not found:
        raise ValueError(f"{file} holds no tensors of an adapter: save the adapter again")
    if len(adapters) > 1:
        raise ValueError(f"{file} holds several adapters ({', '.join(map(str, sorted(adapters, key=str)))}): save one")
    return {module: _complete(file, module, own, kind) for module, own in found.items()}


class Place(NamedTuple):
    """What a key says: of which module and which adapter it holds which part."""

    module: str
    part: str
    adapter: str | None


def _place(key: str | None, kind: type[Adapter]) -> Place | None:
    """None for the key of something else."""
    for part, name in kind.NAMES.items():
        form = rf"(?P<module>.+)\.{re.escape(name.stem)}(\.(?P<adapter>[^.]+))?{re.escape(name.ending)}"
        match = re.fullmatch(form, key or "")
        if match:
            return Place(match["module"], part, match["adapter"])
    return None


def _unwrapped(key: str) -> str | None:
    """A key without PEFT's prefix and other wrappers; None where it has not that prefix."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else None


def _complete(file: Path, module: str, own: Mapping[str, np.ndarray], kind: type[Adapter]) -> Any:
    if own.keys() != kind.NAMES.keys():
        stem = kind.NAMES[min(own)].stem
        raise ValueError(f"{file} holds {stem} of {module!r} without its counterpart: save the adapter again")
    return kind.Parts(**own)


def _check_values(file: Path, key: str, value: np.ndarray, axes: int) -> None:
    if value.ndim != axes or value.dtype not in DTYPES:
        raise ValueError(
            f"{file}: {key!r} is {value.dtype} {value.shape}, expected a float32, float16 or bfloat16 "
            f"{'matrix' if axes == 2 else 'vector'}"
        )
    if not np.isfinite(value).all():
        raise ValueError(f"{file}: {key!r} holds NaN or infinite values: take an earlier checkpoint of the adapter")


def _check_whole(file: Path, key: str, value: np.ndarray, base: TensorFolder | None) -> None:
    """Refuses a tensor that is neither A nor B, unless it is a whole layer whose values are the base's own."""
    match = WHOLE.fullmatch(_unwrapped(key) or "")
    if not match:
        raise NotImplementedError(
            f"{file}: tensor {key!r} is not supported, only lora_A and lora_B of linear layers are"
        )
    if base is None:
        raise NotImplementedError(
            f"{file}: tensor {key!r} is a whole layer, which is not supported here: merge the adapter (export.py "
            f"--adapter DIR --format merged), or save it by PEFT's save_pretrained(save_embedding_layers=False)"
        )
    name = f"{match['module']}.weight"
    other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
    own = name if name in base.names else other
    if own is None or own not in base.names or not _is_own(value, base.read(own)):
        raise NotImplementedError(
            f"{file}: {key!r} {value.shape} is another {match['module'].rsplit('.', 1)[-1]} than the base's: it was "
            f"trained too, or its vocabulary resized, which is not supported; merge the adapter with PEFT"
        )


def _is_own(saved: np.ndarray, own: np.ndarray) -> bool:
    """Whether a saved layer is the base's, each value perhaps rounded to 16 bits on the way."""
    if saved.shape != own.shape or own.dtype not in DTYPES or saved.dtype not in DTYPES:
        return False
    return any(np.array_equal(saved.astype(dtype), own.astype(dtype)) for dtype in DTYPES[:3])
