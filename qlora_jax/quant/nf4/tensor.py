"""NF4Tensor: the packed form of one weight matrix, or of a stack of equal ones. NF4Layer: one of a stack."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.quant.nf4.dequantize import decode_scales, dequantize
from qlora_jax.quant.nf4.layout import BLOCK, NESTED_BLOCK, check_rows, row_layout
from qlora_jax.quant.packed import Packed


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Tensor(Packed):
    """A 4-bit weight `W[N, K]` in bitsandbytes' byte layout, optionally stacked on leading axes `*L`.

    Elements are taken in row-major order, in blocks of 64 that share one scale:

        W.flat[i] = levels[code_i] * absmax[i // 64]
        absmax[j] = nested_levels[absmax[j]] * nested_absmax[j // 256] + offset     (double quantization)

    R = N rows of E = K elements where K is a multiple of 64, so that no block crosses a row; otherwise the matrix is
    kept flat: R = 1, E = N·K. One layer's arrays drop `*L`.

    Attributes:
      codes: uint8 `[*L, R, ceil(E/2)]`, two codes a byte, the first in the high nibble.
      absmax: uint8 `[*L, R, ceil(E/64)]` with double quantization, float32 without.
      nested_absmax: float32 `[*L, ceil(R·ceil(E/64)/256)]`, or None without double quantization.
      nested_levels: float32 `[*L, 256]`, or None.
      offset: float32 `[*L]`, or None.
      shape: (N, K) of one matrix.
      dtype: name of the dtype that the weight had and is dequantized to ("bfloat16", "float16", "float32").
      codebook: which 16 levels, a key of `CODEBOOKS`.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_levels: Any
    offset: Any
    shape: tuple[int, int]
    dtype: str
    codebook: str = "nf4"

    @classmethod
    def create(cls, *arrays: Any, shape: tuple[int, ...], dtype: Any, codebook: str = "nf4") -> "NF4Tensor":
        """Builds a tensor from its arrays, in the order of the attributes and without absent ones at the end, and
        checks that every array's dtype and shape fits `shape`. Raises ValueError."""
        codes, absmax, nested, levels, offset = arrays + (None,) * (len(ARRAY_FIELDS) - len(arrays))
        tensor = cls(codes, absmax, nested, levels, offset, (shape[0], shape[1]), str(jnp.dtype(dtype)), codebook)
        expected = packed_shapes(
            tensor.shape, tensor.dtype, double=tensor.double, leading=tensor.leading, codebook=codebook
        )
        for name, want, got in zip(ARRAY_FIELDS, _arrays(expected), _arrays(tensor), strict=True):
            if (want is None) != (got is None):
                raise ValueError(
                    f"NF4Tensor.{name} is {'absent' if got is None else 'given'}: the nested fields go together"
                )
            if want is not None and (tuple(got.shape), got.dtype) != (want.shape, want.dtype):
                raise ValueError(
                    f"NF4Tensor.{name} must be {want.dtype} {want.shape} for a weight of {tensor.shape}, "
                    f"got {got.dtype} {tuple(got.shape)}"
                )
        return tensor

    @property
    def double(self) -> bool:
        """Whether the scales are quantized a second time."""
        return self.nested_absmax is not None

    def dequantize(self, dtype: Any = None) -> Float[Array, "*L N K"]:
        """The weight, rounded once to its own dtype, then cast to `dtype` if given."""
        return dequantize(self, dtype)

    def matrix(self, index: Int[Array, ""]) -> "NF4Layer":
        """One matrix of a stack with one leading axis, by reference, for the kernels."""
        return NF4Layer(self, index)

    def take_rows(self, index: Int[Array, " M"]) -> "NF4Tensor":
        """The rows at `index`, as a tensor `[M, K]` whose scales are decoded already (float32).

        Raises:
          ValueError: blocks cross the rows, as K is no multiple of 64.
        """
        check_rows(self.shape, "taking rows")
        return self._part(self.codes[index], self.absmax[index], index)

    def slice_rows(self, start: int | Int[Array, ""], size: int) -> "NF4Tensor":
        """`size` rows from `start` on, which may be traced; else as `take_rows`."""
        check_rows(self.shape, "taking rows")
        codes, absmax = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (self.codes, self.absmax))
        return self._part(codes, absmax, start + jnp.arange(size))

    def _part(self, codes, absmax, rows) -> "NF4Tensor":
        if self.double:
            block = rows[:, None] * absmax.shape[1] + jnp.arange(absmax.shape[1])
            absmax = decode_scales(self, absmax.reshape(-1), block.reshape(-1)).reshape(absmax.shape)
        shape = (codes.shape[0], self.shape[1])
        return NF4Tensor.create(codes, absmax, shape=shape, dtype=self.dtype, codebook=self.codebook)


class NF4Layer(NamedTuple):
    """One matrix of a stack, by reference: a loop over layers reads it where it lies, without a copy of its slice.

    Attributes:
      stack: an NF4Tensor with one leading axis `[L, …]`.
      index: int32 scalar, which of the L; may be traced.
    """

    stack: NF4Tensor
    index: Any

    @classmethod
    def of(cls, weight: "NF4Tensor | NF4Layer") -> "NF4Layer":
        """A single matrix as the only one of its stack; a layer stays as it is."""
        if isinstance(weight, NF4Layer):
            return weight
        if weight.leading:
            raise ValueError(
                f"expected one matrix, got a stack {weight.leading} of {weight.shape}: index it, or scan it"
            )
        return cls(jax.tree.map(lambda a: a[None], weight), jnp.int32(0))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.stack.shape

    def take(self) -> NF4Tensor:
        """The matrix by itself: a copy of its arrays, unless XLA can fuse the slice into what reads it."""
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, self.index, 0, keepdims=False), self.stack)


ARRAY_FIELDS = ("codes", "absmax", "nested_absmax", "nested_levels", "offset")
STATIC_FIELDS = ("shape", "dtype", "codebook")


def _arrays(tensor: NF4Tensor) -> tuple:
    return tuple(getattr(tensor, name) for name in ARRAY_FIELDS)


def packed_shapes(shape, dtype, *, double: bool, leading: tuple[int, ...] = (), codebook: str = "nf4") -> NF4Tensor:
    """The NF4Tensor of `jax.ShapeDtypeStruct`s that quantizing a `[*leading, N, K]` weight gives."""
    rows, elements = row_layout(tuple(shape))
    blocks = -(-elements // BLOCK)

    def array(tail, dtype):
        return jax.ShapeDtypeStruct((*leading, *tail), np.dtype(dtype))

    nested = (None, None, None)
    if double:
        groups = -(-rows * blocks // NESTED_BLOCK)
        nested = (array((groups,), np.float32), array((256,), np.float32), array((), np.float32))
    return NF4Tensor(
        array((rows, -(-elements // 2)), np.uint8),
        array((rows, blocks), np.uint8 if double else np.float32),
        *nested,
        shape=tuple(shape),
        dtype=str(jnp.dtype(dtype)),
        codebook=codebook,
    )


def _flatten_with_keys(tensor: NF4Tensor):
    children = [(jax.tree_util.GetAttrKey(name), getattr(tensor, name)) for name in ARRAY_FIELDS]
    return children, tuple(getattr(tensor, name) for name in STATIC_FIELDS)


def _unflatten(static, children) -> NF4Tensor:
    # JAX, Optax and Orbax rebuild trees with masks, strings or None for leaves: no constructor, no checks.
    tensor = object.__new__(NF4Tensor)
    for name, value in zip(ARRAY_FIELDS + STATIC_FIELDS, (*children, *static), strict=True):
        object.__setattr__(tensor, name, value)
    return tensor


def _flatten(tensor: NF4Tensor):
    return _arrays(tensor), tuple(getattr(tensor, name) for name in STATIC_FIELDS)


jax.tree_util.register_pytree_with_keys(NF4Tensor, _flatten_with_keys, _unflatten, _flatten)
