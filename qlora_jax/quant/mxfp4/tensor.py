"""MXFP4Tensor: a weight matrix in 4-bit floats with a power of two for each block, or a stack of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.quant.mxfp4.dequantize import dequantize
from qlora_jax.quant.mxfp4.layout import BLOCK, check_blocks
from qlora_jax.quant.packed import Packed


@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Tensor(Packed):
    """A weight `W[N, K]` in blocks of 32 along K, optionally stacked (OCP Microscaling Formats 1.0; gpt-oss' experts):

        W[n, k] = level[code[n, k]] * 2^(scales[n, k // 32] - 127)

    The 16 levels are ±0, 0.5, 1, 1.5, 2, 3, 4, 6, the sign in a code's highest bit. Values are transformers', bit for
    bit (subnormals too, and infinity where 2^127 · 2 overflows), but for scale 255: the specification says that the
    whole block is NaN, and so it is here, while transformers multiplies by infinity.

    Attributes:
      codes: uint8 `[*L, N, K/2]`, two codes a byte, the first in the low half.
      scales: uint8 `[*L, N, K/32]`.
      dtype: name of the dtype that `dequantize` gives ("bfloat16", "float16", "float32").
    """

    codes: Any
    scales: Any
    dtype: str

    @classmethod
    def create(cls, codes, scales, *, dtype) -> "MXFP4Tensor":
        """Builds a tensor and checks that its arrays fit each other. Raises ValueError."""
        if len(codes.shape) < 2:
            raise ValueError(f"MXFP4Tensor.codes must be uint8 [*L, N, K/2], got {codes.dtype} {tuple(codes.shape)}")
        expected = mxfp4_shapes((*codes.shape[:-1], 2 * codes.shape[-1]), dtype)
        for name, want, got in (("codes", expected.codes, codes), ("scales", expected.scales, scales)):
            if (tuple(got.shape), got.dtype) != (want.shape, want.dtype):
                raise ValueError(
                    f"MXFP4Tensor.{name} must be {want.dtype} {want.shape} for codes {tuple(codes.shape)}, "
                    f"got {got.dtype} {tuple(got.shape)}"
                )
        return cls(codes, scales, expected.dtype)

    @classmethod
    def of_blocks(cls, blocks, scales, *, dtype) -> "MXFP4Tensor":
        """Of a checkpoint's `…_blocks` `[*L, N, K/32, 16]` and `…_scales` `[*L, N, K/32]`; nothing is repacked."""
        return cls.create(blocks.reshape(*blocks.shape[:-2], -1), scales, dtype=dtype)

    @property
    def blocks(self) -> Any:
        """The codes as checkpoints have them, `[*L, N, K/32, 16]`."""
        return self.codes.reshape(*self.scales.shape, BLOCK // 2)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(N, K)."""
        return self.codes.shape[-2], 2 * self.codes.shape[-1]

    def dequantize(self, dtype: Any = None) -> Float[Array, "*L N K"]:
        """The weight, rounded once to its own dtype, then cast to `dtype` if given."""
        weight = dequantize(jnp.asarray(self.codes), jnp.asarray(self.scales), self.dtype)
        return weight if dtype is None else weight.astype(dtype)

    def take_rows(self, index: Int[Array, " M"]) -> "MXFP4Tensor":
        """The rows of a matrix at `index`: `[M, K]`."""
        return MXFP4Tensor(self.codes[index], self.scales[index], self.dtype)

    def slice_rows(self, start: int | Int[Array, ""], size: int) -> "MXFP4Tensor":
        """`size` rows of a matrix from `start` on, which may be traced."""
        codes, scales = (lax.dynamic_slice_in_dim(a, start, size) for a in (self.codes, self.scales))
        return MXFP4Tensor(codes, scales, self.dtype)


def mxfp4_shapes(shape: tuple[int, ...], dtype) -> MXFP4Tensor:
    """The MXFP4Tensor of `jax.ShapeDtypeStruct`s that quantizing a `[*L, N, K]` weight gives."""
    check_blocks(shape)
    codes, scales = (jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // per), np.dtype(np.uint8)) for per in (2, BLOCK))
    return MXFP4Tensor(codes, scales, str(jnp.dtype(dtype)))


# Rebuilding a tree calls the plain constructor, which checks nothing: leaves may be masks, strings or None.
jax.tree_util.register_dataclass(MXFP4Tensor, data_fields=["codes", "scales"], meta_fields=["dtype"])
