"""MXFP4, the 4-bit floats of OCP's microscaling formats: the tensor, and quantization. Plain JAX, no kernels."""

from qlora_jax.quant.mxfp4.quantize import quantize
from qlora_jax.quant.mxfp4.tensor import MXFP4Tensor

__all__ = ["MXFP4Tensor", "quantize"]
