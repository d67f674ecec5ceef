"""Low-rank adapters: which modules they go to, what they are, their arithmetic."""

from qlora_jax.lora.low_rank import LoRA
from qlora_jax.lora.targets import Target, resolve_targets

__all__ = ["LoRA", "Target", "resolve_targets"]
