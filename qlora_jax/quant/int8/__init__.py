"""8-bit integers with one scale a row: the tensor, and quantization. Plain JAX, no kernels."""

from qlora_jax.quant.int8.quantize import quantize
from qlora_jax.quant.int8.tensor import Int8Tensor

__all__ = ["Int8Tensor", "quantize"]
