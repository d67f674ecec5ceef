"""QLoRA fine-tuning in JAX: an NF4 base that stays frozen, low-rank adapters that are trained.

A fine-tune is `train(load_config("configs/demo.py"))`, and what it gives is tried by `load(base, adapter).generate(…)`.
The commands in scripts/ are these functions with arguments read from the command line.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from qlora_jax import config
from qlora_jax.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    QuantSection,
    TrainSection,
    load_config,
)
from qlora_jax.lora.partition import fill_frozen, join_tree, make_optimizer, split_tree
from qlora_jax.lora.tree import LoraWeight, lora_dot, lora_init, lora_mask, merge_tree, quantize_tree
from qlora_jax.quant.nf4 import NF4Tensor, dequantize, quantize

if TYPE_CHECKING:
    from qlora_jax.run.evaluate import evaluate
    from qlora_jax.run.export import export
    from qlora_jax.run.generate import generate
    from qlora_jax.run.load import load
    from qlora_jax.run.plan import plan
    from qlora_jax.run.train import train

__version__ = "0.1.0"

# Where configurations written for earlier versions import their sections from.
sys.modules["qlora_jax.train.config"] = config

# What needs tokenizers, checkpoints and more is imported when it is first asked for.
_LATE = {name: f"qlora_jax.run.{name}" for name in ("evaluate", "export", "generate", "load", "plan", "train")}

__all__ = [
    "Config",
    "DataSection",
    "LoraSection",
    "LoraWeight",
    "ModelSection",
    "NF4Tensor",
    "OptimSection",
    "QuantSection",
    "TrainSection",
    "dequantize",
    "evaluate",
    "export",
    "fill_frozen",
    "join_tree",
    "generate",
    "load",
    "load_config",
    "lora_dot",
    "lora_init",
    "lora_mask",
    "make_optimizer",
    "merge_tree",
    "plan",
    "quantize",
    "quantize_tree",
    "split_tree",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_LATE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
