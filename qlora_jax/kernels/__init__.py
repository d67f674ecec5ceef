"""The two operations that have several implementations, each chosen in its folder's `dispatch`."""

from qlora_jax.kernels.attention import attend
from qlora_jax.kernels.matmul import nf4_matmul

__all__ = ["attend", "nf4_matmul"]
