"""The gated delta rule in chunks: matrix products inside a chunk, a scan over chunks for the state.

Inside a chunk each token's change of the state depends on the earlier ones, by a triangular system (arXiv 2406.06484).
The state is not in the system, so its inverse is computed for many chunks at once. Five products are left to the scan.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.kernels.delta.inverse import unit_inverse
from qlora_jax.kernels.delta.reference import einsum, unit

CHUNK = 64
# Chunks that are prepared at once. With 32 value heads of 128, the backward pass of 8 compiles to 145 MB of temporaries
# on an H200 (16: 276 MB), and they give each of its multiprocessors a matrix. Not timed on a GPU.
GROUP = 8


class Chunk(NamedTuple):
    """What a step of the scan takes: C tokens of K key heads, each of which serves G value heads.

    Attributes:
      q, k: normalised.
      changes: applied to each token's error against the old state, gives what it changes after the tokens before it.
      reads: what part of each token's change each token's output has.
      old: what is left at each token of the state before the chunk.
      new: what is left after the chunk of each token's change.
    """

    q: Float32[Array, "B K C H"]
    k: Float32[Array, "B K C H"]
    v: Float[Array, "B K G C V"]
    changes: Float32[Array, "B K G C C"]
    reads: Float32[Array, "B K G C C"]
    old: Float32[Array, "B K G C"]
    new: Float32[Array, "B K G C"]


def forward(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K G V"],
    decay: Float32[Array, "B T K G"],
    beta: Float32[Array, "B T K G"],
    starts: Int[Array, "B T"],
    state: Float32[Array, "B K G H V"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T K G V"], Float32[Array, "B K G H V"]]:
    """What `reference.forward` computes, in chunks of at most `chunk` tokens."""
    batch, length = starts.shape
    chunk = min(chunk, -(-length // 8) * 8)
    chunks = -(-length // chunk)
    groups = -(-chunks // GROUP)
    padded = groups * -(-chunks // groups) * chunk

    def split(x: Array, heads: int) -> Array:
        """`[B, T, …]` → `[groups, n, B, …, C, …]`, with C after the axes of heads."""
        x = x.reshape(batch, groups, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 3), (0, 1, 3 + heads))

    # Padding belongs to the last document, lets nothing fade (decay 0) and changes nothing (beta 0).
    documents = split(_padded(starts, padded, mode="edge"), heads=0)
    q, k = (split(_padded(x, padded), heads=1) for x in (q, k))
    v, decay, beta = (split(_padded(x, padded), heads=2) for x in (v, decay, beta))
    # The backward pass keeps the operands and the state before each group, and computes one group at a time again.
    group = jax.checkpoint(_group, prevent_cse=False)
    carry = (state, starts[:, 0])
    (state, _), y = lax.scan(group, carry, (q, k, v, decay, beta, documents))
    y = jnp.moveaxis(y, (0, 1, 5), (1, 2, 3)).reshape(batch, padded, *v.shape[3:5], v.shape[6])
    return y[:, :length], state


def _padded(x: Array, length: int, mode: Literal["constant", "edge"] = "constant") -> Array:
    """x with its second axis filled up to a length."""
    return jnp.pad(x, [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)], mode=mode)


def _group(carry, xs):
    """The state and the document after some chunks, and their outputs."""
    state, document = carry
    q, k, v, decay, beta, documents = xs
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    before = jnp.concatenate([document[None], documents[:-1, :, -1]])
    prepared = _prepare(q, k, decay, beta, documents, before)
    state, y = lax.scan(_step, state, Chunk(q, k, v, *prepared))
    return (state, documents[-1, :, -1]), y


def _prepare(q, k, decay, beta, documents: Int[Array, "n B C"], before: Int[Array, "n B"]):
    """`changes`, `reads`, `old` and `new` of each chunk."""
    upto = np.tri(decay.shape[-1], dtype=np.float32)
    # Sums of decays between two tokens, each added up by itself: the difference of two long sums would have the error
    # of the long ones. From token j (excluded) to token i.
    later = jnp.where(upto.T == 0, decay[..., None], 0)
    between = einsum("il,...lj->...ij", upto, later)
    same = documents[..., :, None] == documents[..., None, :]
    visible = (same & (upto > 0))[:, :, None, None]
    left = jnp.exp(jnp.where(visible, between, -jnp.inf))
    keys, queries = (einsum("nBKiH,nBKjH->nBKij", x, k)[:, :, :, None] for x in (k, q))
    changes = unit_inverse(beta[..., None] * keys * left) * beta[..., None, :]
    continues = (documents == before[..., None])[:, :, None, None]
    old = jnp.where(continues, jnp.exp(einsum("il,...l->...i", upto, decay)), 0)
    return changes, queries * left, old, left[..., -1, :]


def _step(state: Float32[Array, "B K G H V"], chunk: Chunk):
    """The state after a chunk, and the chunk's outputs `[B, K, G, C, V]` in v's dtype."""
    known, read = (einsum("BKGHV,BKCH->BKGCV", state, x) for x in (chunk.k, chunk.q))
    error = chunk.v.astype(jnp.float32) - chunk.old[..., None] * known
    change = einsum("BKGij,BKGjV->BKGiV", chunk.changes, error)
    y = chunk.old[..., None] * read + einsum("BKGij,BKGjV->BKGiV", chunk.reads, change)
    added = einsum("BKCH,BKGCV->BKGHV", chunk.k, chunk.new[..., None] * change)
    return chunk.old[..., -1, None, None] * state + added, y.astype(chunk.v.dtype)
