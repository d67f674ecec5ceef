"""The definition of dequantization in plain JAX. Every kernel gives the same bits."""

from jaxtyping import Array, Float

from qlora_jax.quant import nf4
from qlora_jax.quant.nf4 import NF4Layer


def dequantize(layer: NF4Layer, dtype) -> Float[Array, "N K"]:
    """The weight of one layer of a stack: rounded to the dtype it was quantized from, then cast to `dtype`."""
    return nf4.dequantize(layer.take(), dtype)
