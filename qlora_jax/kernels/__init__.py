"""Operations on quantized weights. For NF4 each has a reference that defines it, kernels, and a dispatch among them."""

from qlora_jax.kernels.backend import available, using
from qlora_jax.kernels.dequantize import dequantize
from qlora_jax.kernels.matmul import nf4_matmul, nf4_matmul_group, nf4_matmul_transposed, packed_matmul

__all__ = [
    "available",
    "dequantize",
    "nf4_matmul",
    "nf4_matmul_group",
    "nf4_matmul_transposed",
    "packed_matmul",
    "using",
]
