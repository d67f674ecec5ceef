"""Gradients in another format than the parameter's own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tapped:
    """A parameter, used through `astype` alone, whose gradient is taken by `tap` and so has the dtype of `tap`.

    JAX gives a gradient the dtype of its parameter, and casting the parameter first would cost a whole copy of it.
    Nothing reads the tap, so that it takes no memory in a compiled program.

    Attributes:
      value: float `[…]`; nothing is differentiated by it.
      tap: `[…]`, of any values.
    """

    value: Any
    tap: Any

    def astype(self, dtype) -> jax.Array:
        """The value in `dtype`; its cotangent arrives at the tap, cast once."""
        return _cast(self.value, self.tap, jnp.dtype(dtype))


def tap(params: Any, taps: Any) -> Any:
    """The tree `params` with every array as a Tapped one."""
    return jax.tree.map(lambda value, tap: Tapped(value, tap), params, taps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cast(value, tap, dtype):
    return value.astype(dtype)


def _cast_forward(value, tap, dtype):
    # The tap's dtype is all that the backward pass needs of it.
    return value.astype(dtype), jnp.zeros((), tap.dtype)


def _cast_backward(dtype, like, cotangent):
    return None, cotangent.astype(like.dtype)


_cast.defvjp(_cast_forward, _cast_backward)
