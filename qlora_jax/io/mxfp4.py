"""Experts in MXFP4 as gpt-oss' checkpoints hold them, `…_blocks` and `…_scales`: one of packed.READERS, see there."""

import numpy as np

from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.quant.formats import MXFP4
from qlora_jax.quant.mxfp4 import MXFP4Tensor

# A value in these blocks stands for no single one of a 16-bit base. Attention is left in 16 bits for speed alone.
sampled, experts_only = False, True
BLOCKS, SCALES = "_blocks", "_scales"
# What `name_tensors` calls the scales of a weight: a part of it.
PART = ".mxfp4_scales"
# Checkpoints do not say what they were packed from; transformers runs them in this.
DTYPE = "bfloat16"


def name_tensors(tensors: TensorFolder) -> None:
    """Lets a weight's blocks be known by the weight's own name, and its scales as a part of it."""
    for name in [name for name in tensors.names if name.endswith(BLOCKS)]:
        weight = name.removesuffix(BLOCKS)
        if f"{weight}{SCALES}" in tensors:
            tensors.rename(name, weight)
            tensors.rename(f"{weight}{SCALES}", f"{weight}{PART}")


def holds(tensors: TensorFolder, name: str) -> bool:
    """Whether a folder holds the weight `name` in MXFP4."""
    return f"{name}{PART}" in tensors


def form(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> tuple[MXFP4, str]:
    """(the format, the dtype that it is dequantized to)."""
    return MXFP4(), DTYPE


def origin(tensors: TensorFolder, name: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape `[…, N, K]` of the weight."""
    *leading, count, size = tensors.shape(name)
    return DTYPE, (*leading, 2 * count * size)


def read(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> MXFP4Tensor:
    """The experts of a layer, `[E, N, K]`, of which checkpoints in 16 bits keep the transposed `[E, K, N]`.

    Raises:
      ValueError: arrays of other types or shapes than `shape` asks for.
    """
    blocks, scales = tensors.read(name), tensors.read(f"{name}{PART}")
    experts, inputs, outputs = shape
    want = (experts, outputs, inputs // 32, 16)
    if blocks.dtype != np.uint8 or blocks.shape != want or scales.dtype != np.uint8 or scales.shape != want[:-1]:
        raise ValueError(
            f"{tensors.file(name)}: {name + BLOCKS!r} is {blocks.dtype} {blocks.shape} and {name + SCALES!r} "
            f"{scales.dtype} {scales.shape}, expected uint8 {want} and {want[:-1]}"
        )
    return MXFP4Tensor.of_blocks(blocks, scales, dtype=DTYPE)


def write(name: str, tensor: MXFP4Tensor) -> dict[str, np.ndarray]:
    """The two tensors of a weight or of a layer's experts."""
    return {f"{name}{BLOCKS}": np.asarray(tensor.blocks), f"{name}{SCALES}": np.asarray(tensor.scales)}
