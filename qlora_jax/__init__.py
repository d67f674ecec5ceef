"""QLoRA fine-tuning in JAX: an NF4 base that stays frozen, low-rank adapters that are trained."""

import sys

from qlora_jax import config
from qlora_jax.lora.tree import LoraWeight, lora_dot, lora_init, lora_mask, merge_tree, quantize_tree
from qlora_jax.quant.nf4 import NF4Tensor, dequantize, quantize
from qlora_jax.training.optimizer import fill_frozen, make_optimizer

__version__ = "0.1.0"

# Where configurations written for earlier versions import their sections from.
sys.modules["qlora_jax.train.config"] = config

__all__ = [
    "LoraWeight",
    "NF4Tensor",
    "dequantize",
    "fill_frozen",
    "lora_dot",
    "lora_init",
    "lora_mask",
    "make_optimizer",
    "merge_tree",
    "quantize",
    "quantize_tree",
]
