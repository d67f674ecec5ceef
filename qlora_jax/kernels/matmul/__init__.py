from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_group

__all__ = ["nf4_matmul", "nf4_matmul_group"]
