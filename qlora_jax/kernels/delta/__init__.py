from qlora_jax.kernels.delta.dispatch import gated_delta
from qlora_jax.kernels.delta.gated_norm import gated_norm

__all__ = ["gated_delta", "gated_norm"]
