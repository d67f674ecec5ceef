"""Rotary position embedding (arXiv 2104.09864) with the scalings that Llama checkpoints use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of dimensions, float32 `[head_dim / 2]`."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return plain


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_max_position * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (blend * plain + (1 - blend) * plain / scaling.factor).astype(np.float32)


def rope_tables(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """cos and sin of every position's angles, float32 `[B, T, 1, head_dim / 2]`."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates the first half of each head's dimensions against the second, as Hugging Face checkpoints expect."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
