from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_group, nf4_matmul_transposed
from qlora_jax.kernels.matmul.int8 import int8_matmul

__all__ = ["int8_matmul", "nf4_matmul", "nf4_matmul_group", "nf4_matmul_transposed"]
