"""Dequantization by whatever kernel is chosen for the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.kernels.backend import chosen
from qlora_jax.kernels.dequantize import reference
from qlora_jax.kernels.tiles import tiles_for
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor


def dequantize(weight: NF4Tensor | NF4Layer, dtype=None) -> Float[Array, "N K"]:
    """The weight of one matrix, given by itself or as a layer of a stack.

    Args:
      dtype: a float dtype; the one that the weight was quantized from where None.

    Raises:
      ValueError: a whole stack.
      RuntimeError: a kernel was asked for by name, and there is none for this device or dtype.
    """
    layer = NF4Layer.of(weight)
    name = str(jnp.dtype(layer.stack.dtype if dtype is None else dtype))
    choice = chosen(name)
    if choice.name == "xla":
        return reference.dequantize(layer, name)

    def kernel(layer):
        # Imported here: where no kernel runs, Pallas is neither needed nor loaded.
        if choice.name == "mosaic":
            from qlora_jax.kernels.dequantize import mosaic

            return mosaic.dequantize(layer, name)
        from qlora_jax.kernels.dequantize import triton

        return triton.dequantize(layer, name, tiles_for(choice.capability).dequantize)

    # Arrays that live on the host of a GPU are still the reference's.
    return jax.lax.platform_dependent(layer, cuda=kernel, default=lambda layer: reference.dequantize(layer, name))
