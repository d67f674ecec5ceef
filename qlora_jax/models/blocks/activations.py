"""The activations of feed-forward blocks, by the names that configurations have."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "swish": nnx.silu,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(nnx.gelu, approximate=True),
    "gelu_new": functools.partial(nnx.gelu, approximate=True),
}
