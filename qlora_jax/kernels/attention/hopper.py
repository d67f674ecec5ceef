"""Attention by tokamax's Mosaic kernels for Hopper (H100, H200), forward and backward, in linear memory.

Packed documents and windows go in as the first key that each query sees. tokamax's public function has no argument for
that, so its classes are imported, and the extras of pyproject.toml pin the version that this file was checked with.
"""

import functools
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.kernels.attention.chunked import sinks_gradient

# The version that pyproject.toml pins.
VERSION = "0.0.17"
CAPABILITY = 90
# At 256, the sums of dk and dv alone are all 256 registers of a thread, and ptxas moves 2 KB of them to memory. At 512,
# the tiles of q and k take 262 KB of the 232 KB of shared memory.
LARGEST_HEAD = 128
# What a head's size must be a multiple of: 16 bytes, as the hardware copies them. The kernels pad it.
HEAD_MULTIPLE = 8
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


def obstacle(queries: int, head_dim: int, dtype: str, self_attention: bool) -> str | None:
    """Why the kernels cannot run on a Hopper GPU, in words for the log; None where they can."""
    if head_dim > LARGEST_HEAD:
        return f"heads of {head_dim} need more registers or shared memory than tokamax's kernels for Hopper have"
    if head_dim % HEAD_MULTIPLE:
        return f"tokamax's kernels need heads of a multiple of {HEAD_MULTIPLE}, not {head_dim}"
    if dtype not in DTYPES:
        return f"tokamax's kernels compute in {' or '.join(DTYPES)}, not in {dtype}"
    if not self_attention:
        return "tokamax's kernels read no cache"
    if queries % MULTIPLE:
        return f"tokamax's kernels need a length of a multiple of {MULTIPLE}"
    return None


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
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
    return run(Kernel(kernel, scale, soft_cap), q, k, v, start, sinks)


def mask(start: Int[Array, "B T"]):
    """tokamax's description of the visible keys."""
    from tokamax._src.ops.attention.base import Mask

    # One mask for all heads: version 0.0.17 takes another head's in the backward pass where each has its own.
    return Mask(k_start=start[:, None, :].astype(jnp.int32), is_causal=True)


class Kernel(NamedTuple):
    """One of tokamax's attentions, a `DotProductAttention` with its derivative, and what is static about it."""

    attention: Any
    scale: float
    soft_cap: float

    def bound(self, q, k, v, start):
        """tokamax's record of a call's arguments, those with defaults included."""
        options: Any = dict(logits_scale=self.scale, logits_soft_cap=self.soft_cap or None)
        return self.attention.bind(q, k, v, mask=mask(start), **options)


def run(kernel: Kernel, q, k, v, start, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N H"]:
    """The kernel's output. It knows no sinks; they are put into its results."""
    if sinks is not None:
        return _with_sinks(kernel, q, k, v, start, sinks)
    call = kernel.bound(q, k, v, start)
    return kernel.attention(*call.args, **call.kwargs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_sinks(kernel: Kernel, q, k, v, start, sinks):
    return _with_sinks_forward(kernel, q, k, v, start, sinks)[0]


def _with_sinks_forward(kernel: Kernel, q, k, v, start, sinks):
    call = kernel.bound(q, k, v, start)
    y, (top, total) = kernel.attention(*call.args, **{**call.kwargs, "return_residuals": True})
    without = top + jnp.log(total)  # -inf where a query sees no key
    log_sum = jnp.logaddexp(without, sinks.astype(jnp.float32)[:, None])
    share = jnp.exp(without - log_sum)  # of the weights, what is not the sink's
    y = (y * jnp.swapaxes(share, 1, 2)[..., None]).astype(q.dtype)
    return y, (q, k, v, start, sinks, y, log_sum)


def _with_sinks_backward(kernel: Kernel, residuals, dy):
    # The kernel's weights are exp(score - maximum) / sum: with the log-sum-exp for the maximum and 1 for the sum, they
    # are the weights beside the sinks, and everything after them is as without.
    q, k, v, start, sinks, y, log_sum = residuals
    call = kernel.bound(q, k, v, start)
    options = {name: value for name, value in call.kwargs.items() if name != "return_residuals"}
    grads = kernel.attention.vjp((log_sum, jnp.ones_like(log_sum)), y, dy, *call.args, **options)
    delta = jnp.einsum("BTNH,BTNH->BNT", y, dy, preferred_element_type=jnp.float32)
    return grads["q"], grads["k"], grads["v"], None, sinks_gradient(sinks, log_sum, delta)


_with_sinks.defvjp(_with_sinks_forward, _with_sinks_backward)
