"""Tables of 8-bit integers with one scale a row: the tensor, quantization and dequantization. Plain JAX, no kernels."""

from qlora_jax.quant.int8.quantize import dequantize, quantize
from qlora_jax.quant.int8.tensor import Int8Tensor

__all__ = ["Int8Tensor", "dequantize", "quantize"]
