"""One table file per model family: what its config.json means for the decoder."""

from qlora_jax.models.families import llama, mistral, qwen2, qwen3

FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
