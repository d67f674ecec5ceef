"""Rotary position embedding (arXiv 2104.09864) with the scalings for texts longer than a model was made for."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.models.specs import Rope, RopeScaling


def frequencies(rope: Rope) -> np.ndarray:
    """Angle per position of each pair of dimensions, float32 `[dims / 2]`, whatever the length of the text."""
    plain = (1.0 / np.float32(rope.theta) ** _exponents(rope)).astype(np.float32)
    scaling = rope.scaling
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(plain, scaling, rope.dims, rope.theta)
    if scaling.kind == "proportional":
        return np.where(np.arange(rope.dims // 2) < scaling.moving, plain / np.float32(scaling.factor), 0)
    return plain


def frequencies_by_length(rope: Rope, lengths: Int[Array, "B S"]) -> Float[Array, "B S h"]:
    """The same for the kinds by which they depend on how many tokens the text has."""
    scaling = rope.scaling
    tokens = lengths[..., None].astype(jnp.float32)
    if scaling.kind == "longrope":
        short, long = (np.asarray(f, np.float32) for f in (scaling.short_factors, scaling.long_factors))
        return jnp.asarray(frequencies(rope)) / jnp.where(tokens > scaling.original_max_position, long, short)
    # A larger base for a longer text: "NTK-aware" interpolation.
    original, dims = scaling.original_max_position, rope.dims
    stretch = scaling.factor * jnp.maximum(tokens, original) / original - (scaling.factor - 1)
    return 1.0 / (rope.theta * stretch ** (dims / (dims - 2))) ** jnp.asarray(_exponents(rope))


def _exponents(rope: Rope) -> np.ndarray:
    return np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_max_position * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (blend * plain + (1 - blend) * plain / scaling.factor).astype(np.float32)


def _yarn(plain: np.ndarray, scaling: RopeScaling, dims: int, theta: float) -> np.ndarray:
    """arXiv 2309.00071: as Llama 3.1, but blended evenly over dimensions between two numbers of turns."""

    def dimension(turns: float) -> float:
        return dims * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (np.arange(dims // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    stretched = np.clip(ramp, 0, 1)
    return (plain / scaling.factor * stretched + plain * (1 - stretched)).astype(np.float32)


def rope_tables(rope: Rope, positions: Int[Array, "B T"], lengths: Int[Array, "#B #T"]) -> tuple[Array, Array]:
    """cos and sin of every position's angles, float32 `[B, T, 1, dims / 2]`.

    Args:
      lengths: how many tokens each token's text has, as far as it is known; may be `[B, 1]` or `[1, 1]`.
    """
    scaling = rope.scaling
    by_pair = frequencies_by_length(rope, lengths) if scaling.by_length else frequencies(rope)
    angles = positions[..., None].astype(jnp.float32) * by_pair
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if scaling.attention_factor == 1.0:
        return cos, sin
    return cos * np.float32(scaling.attention_factor), sin * np.float32(scaling.attention_factor)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array, *, pairs: bool = False) -> Float[Array, "B T N H"]:
    """Rotates the first dimensions of each head, twice as many as `cos` has; the others stay as they are.

    `pairs`: neighbours against each other; else, as most Hugging Face checkpoints expect, halves.
    """
    dims = 2 * cos.shape[-1]
    x, rest = x[..., :dims], x[..., dims:]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = (x[..., ::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    y = jnp.stack(turned, axis=-1).reshape(x.shape) if pairs else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
