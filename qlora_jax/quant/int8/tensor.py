"""Int8Tensor: a weight matrix in 8 bits, or a stack of them, with a scale for each row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.quant.packed import Packed


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Tensor(Packed):
    """An 8-bit weight `W[N, K]`, quantized symmetrically by the absolute maximum of each row, optionally stacked:

        W[n, k] = codes[n, k] * scale[n],    scale[n] = absmax(W[n, :]) / 127

    A row needs nothing but itself, so that an embedding reads no other rows than its tokens'.

    Attributes:
      codes: int8 `[*L, N, K]`, from -127 to 127.
      scale: float32 `[*L, N]`.
      dtype: name of the dtype that the weight had and is dequantized to ("bfloat16", "float16", "float32").
    """

    codes: Any
    scale: Any
    dtype: str

    @classmethod
    def create(cls, codes, scale, *, dtype) -> "Int8Tensor":
        """Builds a tensor and checks that its arrays fit each other. Raises ValueError."""
        expected = int8_shapes(tuple(codes.shape), dtype)
        for name, want, got in (("codes", expected.codes, codes), ("scale", expected.scale, scale)):
            if len(codes.shape) < 2 or (tuple(got.shape), got.dtype) != (want.shape, want.dtype):
                raise ValueError(
                    f"Int8Tensor.{name} must be {want.dtype} {want.shape} for matrices [*L, N, K], "
                    f"got {got.dtype} {tuple(got.shape)}"
                )
        return cls(codes, scale, expected.dtype)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(N, K)."""
        return self.codes.shape[-2:]

    def dequantize(self, dtype: Any = None) -> Float[Array, "*L N K"]:
        """The weight: multiplied in float32, rounded once to its own dtype, then cast to `dtype` if given."""
        weight = (self.codes.astype(jnp.float32) * self.scale[..., None]).astype(self.dtype)
        return weight if dtype is None else weight.astype(dtype)

    def take_rows(self, index: Int[Array, " M"]) -> "Int8Tensor":
        """The rows of a matrix at `index`: `[M, K]`."""
        return Int8Tensor(self.codes[index], self.scale[index], self.dtype)

    def slice_rows(self, start: int | Int[Array, ""], size: int) -> "Int8Tensor":
        """`size` rows of a matrix from `start` on, which may be traced."""
        codes, scale = (lax.dynamic_slice_in_dim(a, start, size) for a in (self.codes, self.scale))
        return Int8Tensor(codes, scale, self.dtype)


def int8_shapes(shape: tuple[int, ...], dtype) -> Int8Tensor:
    """The Int8Tensor of `jax.ShapeDtypeStruct`s that quantizing a `[*L, N, K]` weight gives."""
    codes = jax.ShapeDtypeStruct(tuple(shape), np.dtype(np.int8))
    return Int8Tensor(codes, jax.ShapeDtypeStruct(codes.shape[:-1], np.dtype(np.float32)), str(jnp.dtype(dtype)))


# Rebuilding a tree calls the plain constructor, which checks nothing: leaves may be masks, strings or None.
jax.tree_util.register_dataclass(Int8Tensor, data_fields=["codes", "scale"], meta_fields=["dtype"])
