"""What transformers, PEFT and bitsandbytes make of a family's folders."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.checkpoints import class_of, load


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """float32 logits of texts."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)).logits.float().numpy()


def load_strictly(folder: Path, base: Path, **options):
    """The model of the class that config.json names; transformers says no more of its tensors than of the base's.

    That is nothing, but for what predicts several tokens at once: some of it is reported as not used.
    """
    model, found = _loaded(folder, **options)
    assert found == _loaded(base, dtype="float32")[1]
    assert not any(found.values()) or base.name.endswith("_mtp")
    return model.eval()


def _loaded(folder: Path, **options) -> tuple[Any, dict[str, set]]:
    """The model, and the names of which transformers says something."""
    options = dict(attn_implementation="eager") | options
    model, found = class_of(folder).from_pretrained(folder, output_loading_info=True, **options)
    return model, {kind: set(found[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def adapted(folder: Path, adapter: Path, **options):
    """PEFT's model of a base and an adapter."""
    import peft

    return peft.PeftModel.from_pretrained(load(folder), adapter, **options)


def adapter_tensors(model) -> dict[str, Any]:
    """The adapter's parameters by the names that PEFT's file has for them."""
    return {name.replace(".default", ""): value for name, value in model.named_parameters() if ".lora_" in name}


def save_random_adapter(folder: Path, out: Path, targets: str | list[str]):
    """An adapter that PEFT makes and saves; returns the model that has it."""
    import peft
    import torch

    with warnings.catch_warnings():
        # PEFT adds a rank for fused experts wherever gate_proj stands among the targets, and then misses them.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        model = peft.get_peft_model(load(folder), peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    model.save_pretrained(out)
    return model


def dequantized(folder: Path, base: Path):
    """The float32 model of a 4-bit folder, its weights unpacked by bitsandbytes.

    bitsandbytes computes in the dtype that config.json names, bfloat16: its own forward pass is 1e-2 off. Constants
    that transformers rounds to the model's dtype (a factor of the embedding) are those of the float32 base.
    """
    model = load(base)
    model.load_state_dict(load_strictly(folder, base).dequantize().state_dict(), strict=True)
    return model
