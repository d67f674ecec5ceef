from qlora_jax.kernels.matmul.dispatch import nf4_matmul

__all__ = ["nf4_matmul"]
