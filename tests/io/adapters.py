"""Adapters with random A and B: PEFT's and ours."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch

from qlora_jax.io.adapter import Adapter
from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import attach_adapter
from qlora_jax.lora import resolve_targets
from qlora_jax.lora.low_rank import Pair
from qlora_jax.models.table import linear_modules
from qlora_jax.quant.rules import rules_for
from tests.io.torch_model import TOKENS, load, logits


def written_by_peft(base, folder, **settings):
    """An adapter of PEFT's with random A and B in `folder`; its logits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    # By default PEFT adds the whole output layer where it is adapted.
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def our_model(base):
    return load_model(base, dtype="float32", rules=rules_for("none")).model


def our_logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(TOKENS, jnp.int32)))


def with_random_adapter(base, lora):
    """Our model with random A and B, and its targets."""
    model, random = our_model(base), np.random.default_rng(0)
    shapes = {f"{name}_proj": (64, 64) for name in "qo"} | {f"{name}_proj": (32, 64) for name in "kv"}
    shapes |= {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128), "lm_head": (160, 64)}
    weights = {}
    for name, target in resolve_targets(lora, linear_modules(model.config)).items():
        n, k = shapes[name.rsplit(".", 1)[-1]]
        A, B = random.normal(0, 0.3, (target.rank, k)), random.normal(0, 0.3, (n, target.rank))
        weights[name] = Pair(A.astype(np.float32), B.astype(np.float32))
    adapter = Adapter(lora=lora, weights=weights, base=None, base_hash=None, extra={})
    return model, attach_adapter(model, adapter, base_hash=None)
