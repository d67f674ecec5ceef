"""Attention by tokamax's Mosaic kernels for Hopper (H100, H200), forward and backward, in linear memory.

Packed documents and windows go in as the first key that each query sees. tokamax's public function has no argument for
that, so its classes are imported, and the extras of pyproject.toml pin the version that this file was checked with.
"""

from importlib import metadata

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The version that pyproject.toml pins.
VERSION = "0.0.17"
CAPABILITY = 90
HEAD_SIZES = (64, 128)
DTYPES = ("bfloat16", "float16")
# What the length must be a multiple of: the longest tile's side, so that no tile is partly padding.
MULTIPLE = 128
# What tokamax's heuristics give for these head sizes; left to them, every trace would log two long warnings.
FORWARD_TILES = dict(block_q=64, block_kv=128, num_stages=2, persistent=False)
BACKWARD_TILES = dict(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2, compute_wgs=2)


def installed() -> bool:
    """Whether this version of tokamax is there; it needs Python 3.12 and jax 0.11.1."""
    try:
        return metadata.version("tokamax") == VERSION
    except metadata.PackageNotFoundError:
        return False


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    *,
    scale: float,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """What `reference.forward` computes at offset 0.

    Raises:
      NotImplementedError: the default device is no Hopper GPU, or the dtype has more than 16 bits (tokamax's error).
    """
    from tokamax._src.ops.attention.pallas_mosaic_gpu import ConfigSM90, PallasMosaicGpuFlashAttention
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp import PallasMosaicGpuFlashAttentionVjp
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp_common import Config

    backward = PallasMosaicGpuFlashAttentionVjp(config=Config(**BACKWARD_TILES))
    kernel = PallasMosaicGpuFlashAttention(config=ConfigSM90(**FORWARD_TILES), vjp=backward)
    return kernel(q, k, v, mask=mask(start), logits_scale=scale, logits_soft_cap=soft_cap or None)


def mask(start: Int[Array, "B T"]):
    """tokamax's description of the visible keys."""
    from tokamax._src.ops.attention.base import Mask

    # One mask for all heads: version 0.0.17 takes another head's in the backward pass where each has its own.
    return Mask(k_start=start[:, None, :].astype(jnp.int32), is_causal=True)
