"""NF4 numerics: the 16 levels, the packed tensor, quantization and dequantization. Plain JAX, no kernels."""

from qlora_jax.quant.nf4.codebook import CODEBOOKS, dynamic_map
from qlora_jax.quant.nf4.dequantize import dequantize
from qlora_jax.quant.nf4.quantize import quantize
from qlora_jax.quant.nf4.tensor import NF4Layer, NF4Tensor

__all__ = [
    "CODEBOOKS",
    "NF4Layer",
    "NF4Tensor",
    "dequantize",
    "dynamic_map",
    "quantize",
]
