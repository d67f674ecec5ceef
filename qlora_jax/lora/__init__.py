"""Low-rank adapters: their configuration, which modules they go to, their arithmetic."""

from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.delta import LoRA
from qlora_jax.lora.targets import Target, resolve_targets

__all__ = ["LoRA", "LoraConfig", "Target", "resolve_targets"]
