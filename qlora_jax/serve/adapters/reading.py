"""One adapter from its folder into host memory, checked and laid out as the device takes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from qlora_jax.io.build import Quantization
from qlora_jax.io.identity import RECORD
from qlora_jax.io.peft import WEIGHTS, Adapter, check_base, check_fits, read_adapter
from qlora_jax.io.peft_config import CONFIG
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.adapters import module_names
from qlora_jax.models.config import ModelConfig
from qlora_jax.serve.request import Refused
from qlora_jax.serve.runner import Weights, powers, served_paths

FILES = (CONFIG, WEIGHTS, RECORD)
LARGEST_SETTINGS = 1 << 20

# (inode, size, time of change in ns) of each of FILES, None where it is absent.
Fingerprint = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an adapter must keep to.

    Attributes:
      rank: the largest rank.
      nbytes: the largest file of weights.
      base_hash: content hash of the base; None leaves it unchecked.
      quantization: how the base is stored; None where it is in 16 or 32 bits.
    """

    config: ModelConfig
    rank: int
    nbytes: int
    dtype: Any
    base_hash: str | None
    quantization: Quantization | None


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory.

    Attributes:
      key: hash of its files' bytes.
      rank: its largest.
      weights: of every linear layer that it changes, by path.
    """

    key: str
    rank: int
    weights: Mapping[str, Weights]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for weights in self.weights.values() for array in weights)


def fingerprint(folder: Path) -> Fingerprint:
    """What tells a changed adapter from an unchanged one without reading it."""
    return tuple(_fingerprint(folder / file) for file in FILES)


def _fingerprint(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_checked(name: str, folder: Path, limits: Limits) -> HostAdapter:
    """Reads an adapter for serving.

    Raises:
      Refused: with one line that names the adapter, what is wrong and what would be right.
    """
    try:
        _check_sizes(folder, limits)
        key = content_hash(folder)
        adapter = read_adapter(folder)
        check_base(adapter, limits.base_hash)
        check_fits(adapter, limits.config)
        _check_storage(adapter, limits.quantization)
        _check_targets(adapter, limits)
    except (ValueError, NotImplementedError, OSError, TypeError, AttributeError) as error:
        # TypeError, AttributeError: a setting of the wrong type, in a file that someone made by hand.
        # Whoever sends requests need not know where the adapters lie.
        words = str(error).replace(f"{folder}/", "").replace(str(folder), "its folder")
        raise Refused(f"adapter {name!r}: {words}") from error
    return HostAdapter(key, max(t.rank for t in adapter.targets.values()), _laid_out(adapter, limits))


def content_hash(folder: Path) -> str:
    """32 hexadecimal digits over the bytes of an adapter's files."""
    digest = xxhash.xxh3_128()
    for file in FILES:
        path = folder / file
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{file} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _check_sizes(folder: Path, limits: Limits) -> None:
    for file in FILES:
        most = limits.nbytes if file == WEIGHTS else LARGEST_SETTINGS
        path = folder / file
        if path.exists() and (size := path.stat().st_size) > most:
            raise ValueError(f"{file} has {size:,} bytes, at most {most:,} are served")


def _check_storage(adapter: Adapter, quantization: Quantization | None) -> None:
    """Refuses an adapter that was trained on the same base stored otherwise: it would answer otherwise."""
    if quantization is None or adapter.extra.get("method") != "qlora":
        return
    for field in ("double", "lm_head", "embedding"):
        served, recorded = getattr(quantization, field), adapter.extra.get(field, getattr(Quantization(), field))
        if served != recorded:
            raise ValueError(
                f"it was trained on a base with quant.{field}={recorded!r}, this one has {served!r}: "
                f"serve the base with quant.{field}={recorded!r}"
            )


def _check_targets(adapter: Adapter, limits: Limits) -> None:
    if OUTPUT_LAYER in adapter.weights:
        raise NotImplementedError(
            f"it changes {OUTPUT_LAYER}, which is served as it is: merge the adapter and serve the merged model"
        )
    rank = max(target.rank for target in adapter.targets.values())
    if rank > limits.rank:
        raise ValueError(f"its rank is {rank}, at most {limits.rank} is served: start with a larger max_rank")


def _laid_out(adapter: Adapter, limits: Limits) -> dict[str, Weights]:
    """Every changed linear layer's A, B and scale, stacked over the decoder's layers."""
    found = {}
    for path, shape in served_paths(limits.config).items():
        names = module_names(limits.config, path)
        if any(name in adapter.weights for name in names):
            found[path] = _stacked(adapter, names, shape, limits)
    return found


def _stacked(adapter: Adapter, names: list[str], shape: tuple[int, ...], limits: Limits) -> Weights:
    n, k = shape
    targets = adapter.targets
    largest = max(targets[name].rank for name in names if name in targets)
    # Few ranks: each is a program of its own that puts an adapter into the stacks.
    rank = next(rank for rank in powers(min(8, limits.rank), limits.rank) if rank >= largest)
    A, B = np.zeros((len(names), rank, k), limits.dtype), np.zeros((len(names), n, rank), limits.dtype)
    scale = np.zeros(len(names), np.float32)
    for layer, name in enumerate(names):
        if name in targets:
            a, b = adapter.weights[name]
            with np.errstate(over="ignore"):  # found below
                A[layer, : len(a)], B[layer, :, : len(a)], scale[layer] = a, b, targets[name].scale
    if not (np.isfinite(A).all() and np.isfinite(B).all() and np.isfinite(scale).all()):
        raise Refused(f"an adapter's weights for {names[0]!r} are not finite in {np.dtype(limits.dtype).name}")
    return Weights(_pinned(A), _pinned(B), scale)


def _pinned(array: np.ndarray) -> Any:
    """The array where a GPU fetches it without a detour: in page-locked memory; elsewhere as it is."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
