"""Dequantization by whatever kernel is chosen for the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.kernels.backend import chosen
from qlora_jax.kernels.dequantize import mosaic, reference, triton
from qlora_jax.kernels.tiles import tiles_for
from qlora_jax.nf4 import NF4Layer, NF4Tensor

DTYPES = ("bfloat16", "float16", "float32")


def dequantize(weight: NF4Tensor | NF4Layer, dtype=None) -> Float[Array, "N K"]:
    """The weight of one matrix, given by itself or as a layer of a stack.

    Args:
      dtype: bfloat16, float16 or float32; the dtype that the weight was quantized from where None.

    Raises:
      ValueError: another dtype, or a whole stack.
    """
    layer = NF4Layer.of(weight)
    name = str(jnp.dtype(layer.stack.dtype if dtype is None else dtype))
    if name not in DTYPES:
        raise ValueError(f"dequantize gives {', '.join(DTYPES)}, not {name}")
    choice = chosen()
    if choice.name == "xla":
        return reference.dequantize(layer, name)

    def kernel(layer):
        if choice.name == "mosaic":
            return mosaic.dequantize(layer, name)
        return triton.dequantize(layer, name, tiles_for(choice.capability).dequantize)

    # Arrays that live on the host of a GPU are still the reference's.
    return jax.lax.platform_dependent(layer, cuda=kernel, default=lambda layer: reference.dequantize(layer, name))
