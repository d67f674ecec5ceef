"""Operations on NF4 weights: each has a reference that defines it, kernels, and a dispatch that chooses among them."""

from qlora_jax.kernels.backend import available, using
from qlora_jax.kernels.dequantize import dequantize
from qlora_jax.kernels.matmul import nf4_matmul, nf4_matmul_group

__all__ = ["available", "dequantize", "nf4_matmul", "nf4_matmul_group", "using"]
