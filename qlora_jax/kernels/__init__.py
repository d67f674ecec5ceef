"""Operations on NF4 weights. `nf4_matmul` is the one place where an implementation is chosen."""

from qlora_jax.kernels.matmul import nf4_matmul

__all__ = ["nf4_matmul"]
