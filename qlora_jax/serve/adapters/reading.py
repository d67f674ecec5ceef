"""One adapter from its folder into host memory, checked and laid out as the device takes it."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from qlora_jax.config import QuantSection
from qlora_jax.io.adapter import Adapter, check_base, fitted
from qlora_jax.io.bounded_json import FILE_BYTES
from qlora_jax.io.identity import RECORD
from qlora_jax.io.peft import WEIGHTS, read_adapter
from qlora_jax.io.peft_config import CONFIG, read_settings
from qlora_jax.io.record import read_record
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.lora.targets import EXPERTS, OUTPUT_LAYER
from qlora_jax.models.adapters import shape_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Param
from qlora_jax.serve.request import Refused
from qlora_jax.serve.runner import Weights, padded_ranks, served

log = logging.getLogger("qlora_jax.serve")
FILES = (CONFIG, WEIGHTS, RECORD)
# Of the table of tensors before the weights: a model of 500 layers has fewer.
LARGEST_HEADER = 1 << 20
LONGEST_REASON = 600
DTYPES = ("F64", "F32", "F16", "BF16")

# (inode, size, times of writing and of any change in ns) of each of FILES, None where it is absent. The last one is the
# file system's own: nobody sets it back.
Fingerprint = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an adapter must keep to.

    Attributes:
      rank: the largest rank.
      expert_rank: the largest rank on experts; 0 where these take no adapters.
      nbytes: the largest file of weights.
      base_hash: content hash of the base; None leaves it unchecked.
      quantization: how the base is stored; None where it is in 16 or 32 bits.
      base: its tensors, with which the whole layers that an adapter's file may hold are compared; None refuses these.
    """

    config: ModelConfig
    rank: int
    nbytes: int
    dtype: Any
    base_hash: str | None
    quantization: QuantSection | None
    base: TensorFolder | None = None
    expert_rank: int = 0


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


def _fingerprint(file: Path) -> tuple[int, int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:  # absent, or not to be reached; reading it says which
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def changed_at(seen: Fingerprint) -> float:
    """When a file was changed last, in seconds of the epoch."""
    return max((file[3] for file in seen if file), default=0) / 1e9


def read_checked(name: str, folder: Path, limits: Limits) -> HostAdapter:
    """Reads an adapter for serving.

    Raises:
      Refused: with one line that names the adapter, what is wrong and what would be right.
    """
    with _refusals(name, folder):
        _check_sizes(folder, limits)
        _check_header(folder / WEIGHTS)
        key = content_hash(folder)
        adapter = read_adapter(folder, limits.base)
        check_base(adapter, limits.base_hash)
        adapter = fitted(adapter, limits.config)
        _check_storage(adapter.extra, limits.quantization)
        _check_targets(adapter, limits)
        return HostAdapter(key, max(t.rank for t in adapter.targets.values()), _laid_out(adapter, limits))


def check_unread(name: str, folder: Path, limits: Limits) -> None:
    """Refuses by all but the weights' values, which takes a thousandth of the time: for the list at the start.

    Raises:
      Refused: as read_checked would.
    """
    with _refusals(name, folder):
        _check_sizes(folder, limits)
        read_settings(folder / CONFIG)
        _check_header(folder / WEIGHTS)
        if (folder / RECORD).exists():
            _check_storage(read_record(folder / RECORD), limits.quantization)


@contextlib.contextmanager
def _refusals(name: str, folder: Path) -> Iterator[None]:
    """Whatever is wrong with an adapter's files refuses that adapter, and nothing else."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not isinstance(error, ValueError | NotImplementedError | OSError):
            log.exception(f"adapter {name!r}: its files were not expected to fail in this way")
        # Whoever sends requests need not know where the adapters lie.
        words = str(error).replace(f"{folder}/", "").replace(str(folder), "its folder") or type(error).__name__
        raise Refused(f"adapter {name!r}: {words[:LONGEST_REASON]}") from error


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
        path = folder / file
        if not path.exists():
            continue
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{file} is no file")
        most = limits.nbytes if file == WEIGHTS else FILE_BYTES
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{file} has {size:,} bytes, at most {most:,} are served")
    with (folder / WEIGHTS).open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if LARGEST_HEADER < header < limits.nbytes:  # what is larger still is no safetensors file, and found to be none
        raise ValueError(f"{WEIGHTS} lists its tensors in {header:,} bytes, at most {LARGEST_HEADER:,} are served")


def _check_header(file: Path) -> None:
    """By the table before the weights alone."""
    try:
        with safe_open(file, "numpy") as tensors:
            tables = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            for name, table in tables.items():
                dtype, shape = table.get_dtype(), table.get_shape()
                if dtype not in DTYPES or len(shape) != 2:
                    raise ValueError(
                        f"{file}: {name!r} is {dtype} {shape}, expected a float32, float16 or bfloat16 matrix"
                    )
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): copy it again") from error


def _check_storage(record: Mapping[str, Any], quantization: QuantSection | None) -> None:
    """Refuses an adapter that was trained on the same base stored otherwise: it would answer otherwise."""
    if quantization is None or record.get("method") != "qlora":
        return
    for field in ("double", "lm_head", "embedding"):
        served, recorded = getattr(quantization, field), record.get(field, getattr(QuantSection(), field))
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
    # Of linear layers, and of experts: the largest comes last.
    by_rank = sorted(adapter.targets.items(), key=lambda item: item[1].rank)
    ranks = {EXPERTS in module: target.rank for module, target in by_rank}
    if ranks.get(False, 0) > limits.rank:
        raise ValueError(f"its rank is {ranks[False]}, at most {limits.rank} is served: start with a larger max_rank")
    if ranks.get(True, 0) > limits.expert_rank:
        raise ValueError(
            f"its rank on experts is {ranks[True]}, at most {limits.expert_rank} is served: start with a larger "
            f"max_expert_rank"
        )


def _laid_out(adapter: Adapter, limits: Limits) -> dict[str, Weights]:
    """Every changed linear layer's A, B and scale, stacked over the decoder's layers."""
    return {
        path: _stacked(adapter, param, limit, limits.dtype)
        for path, (param, limit) in served(limits.config, limits.rank, limits.expert_rank).items()
        if any(module in adapter.weights for module in param.modules)
    }


def _stacked(adapter: Adapter, param: Param, limit: int, dtype: Any) -> Weights:
    with np.errstate(over="ignore"):  # found below
        parts, scale = adapter.on(param)
        largest = max(part.A.shape[-2] for part in parts if part is not None)
        rank = next(rank for rank in padded_ranks(limit) if rank >= largest)
        A, B = adapter.kind.of(param.experts).stacked(parts, shape_of(param, rank), dtype)
    if not (np.isfinite(A).all() and np.isfinite(B).all() and np.isfinite(scale).all()):
        raise Refused(f"an adapter's weights for {param.modules[0]!r} are not finite in {np.dtype(dtype).name}")
    return Weights(_pinned(A), _pinned(B), scale)


def _pinned(array: np.ndarray) -> Any:
    """The array where a GPU fetches it without a detour: in page-locked memory; elsewhere as it is."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
