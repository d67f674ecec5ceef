"""Operations on quantized weights. For NF4 each has a reference that defines it, kernels, and a dispatch among them."""

from qlora_jax.kernels.backend import chosen, using
from qlora_jax.kernels.dequantize import dequantize
from qlora_jax.kernels.matmul import int8_matmul, nf4_matmul, nf4_matmul_group

__all__ = ["chosen", "dequantize", "int8_matmul", "nf4_matmul", "nf4_matmul_group", "using"]
