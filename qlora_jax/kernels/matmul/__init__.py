from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_group, nf4_matmul_transposed
from qlora_jax.kernels.matmul.packed import packed_matmul, packed_matmul_transposed

__all__ = ["nf4_matmul", "nf4_matmul_group", "nf4_matmul_transposed", "packed_matmul", "packed_matmul_transposed"]
