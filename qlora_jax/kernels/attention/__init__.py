from qlora_jax.kernels.attention.dispatch import attend

__all__ = ["attend"]
