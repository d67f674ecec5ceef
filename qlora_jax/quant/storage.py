"""A weight in whatever way it is stored: as an array, in NF4 or in int8."""

from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.quant import int8, nf4
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.nf4 import NF4Tensor

# Names of the ways, as configurations and adapters' records have them.
STORAGES = ("none", "nf4", "int8")

Quantized = NF4Tensor | Int8Tensor
Weight = Float[Array, "N K"] | Quantized


def take_rows(weight: Weight, index: Int[Array, "*B"]) -> Float[Array, "*B K"]:
    """The rows at `index`, dequantized; no other row of the table is.

    Raises:
      ValueError: a table in NF4 whose rows are no multiple of 64 elements.
    """
    flat = index.reshape(-1)
    if isinstance(weight, NF4Tensor):
        rows = nf4.dequantize(nf4.take_rows(weight, flat))
    elif isinstance(weight, Int8Tensor):
        rows = int8.dequantize(weight.take_rows(flat))
    else:
        return weight[index]
    return rows.reshape(*index.shape, -1)


def slice_rows(weight: Weight, start: int | Int[Array, ""], size: int) -> Float[Array, "M K"] | Quantized:
    """`size` rows from `start` on, which may be traced; stored as the whole is. Raises as `take_rows` does."""
    if isinstance(weight, NF4Tensor):
        return nf4.slice_rows(weight, start, size)
    if isinstance(weight, Int8Tensor):
        return weight.slice_rows(start, size)
    return lax.dynamic_slice_in_dim(weight, start, size)
