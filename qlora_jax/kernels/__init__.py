"""Operations on quantized weights. For NF4 each has a reference that defines it, kernels, and a dispatch among them."""

from qlora_jax.kernels.backend import available, using
from qlora_jax.kernels.dequantize import dequantize
from qlora_jax.kernels.matmul import int8_matmul, nf4_matmul, nf4_matmul_group, nf4_matmul_transposed

__all__ = [
    "available",
    "dequantize",
    "int8_matmul",
    "nf4_matmul",
    "nf4_matmul_group",
    "nf4_matmul_transposed",
    "using",
]
