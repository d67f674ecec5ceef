"""Checkpoints that hold their tensors as some on the Hub do: other names, fused, packed, or more than the model."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.spec import HIDDEN

Tensors = dict[str, Any]
# MXFP4's codes: E2M1, the sign last.
LEVELS = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MXFP4 = dict(
    quant_method="mxfp4",
    modules_to_not_convert=[
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Another way to hold a family's tensors.

    Attributes:
      family: whose checkpoint is rewritten.
      change: from torch tensors by name to those of the file.
      config: what is added to config.json.
      unpacks: whether transformers must be told to unpack MXFP4.
    """

    family: str
    change: Callable[[Tensors], Tensors]
    config: Mapping[str, Any] = field(default_factory=dict)
    unpacks: bool = False

    def rewrite(self, folder: Path) -> None:
        """Changes the files of a folder."""
        from safetensors.torch import load_file, save_file

        file, settings = folder / "model.safetensors", folder / "config.json"
        tensors = {name: tensor.contiguous() for name, tensor in self.change(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **self.config}, indent=2))

    def loading(self) -> dict[str, Any]:
        """What transformers needs to load it."""
        import transformers

        return dict(quantization_config=transformers.Mxfp4Config(dequantize=True)) if self.unpacks else {}


def to_mxfp4(tensors: Tensors) -> Tensors:
    """Experts `[E, in, out]` as codes `[E, out, in / 32, 16]` and scales `[E, out, in / 32]`."""
    import torch

    found: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        blocks = tensor.float().numpy().swapaxes(1, 2)
        blocks = blocks.reshape(*blocks.shape[:2], -1, 32)
        exponents = np.floor(np.log2(np.abs(blocks).max(-1))).astype(int) - 2
        codes = np.abs((blocks / 2.0 ** exponents[..., None])[..., None] - LEVELS).argmin(-1).astype(np.uint8)
        found[f"{name}_blocks"] = torch.tensor(codes[..., ::2] | codes[..., 1::2] << 4)
        found[f"{name}_scales"] = torch.tensor((exponents + 127).astype(np.uint8))
    return found


def fuse_experts(tensors: Tensors) -> Tensors:
    """All experts of a layer in two tensors `[E, 2F, D]` and `[E, D, F]` in place of three for each."""
    import torch

    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in sorted({name.split(".experts.")[0] for name in tensors.keys() - found.keys()}):
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{i}.{kind}_proj.weight"] for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        found[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{layer}.experts.down_proj"] = down
    return found


def model_first(tensors: Tensors) -> Tensors:
    """`model.language_model.layers…` for the older `language_model.model.layers…`, and so on."""
    prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    def renamed(name: str) -> str:
        old = next((old for old in prefixes if name.startswith(old)), None)
        return name if old is None else prefixes[old] + name.removeprefix(old)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def with_predictor(tensors: Tensors) -> Tensors:
    """Besides the model, what predicts more than one token: of Qwen3.5, under a name of its own."""
    import torch

    more = {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN), "mtp.layers.0.input_layernorm.weight": (HIDDEN,)}
    return {**tensors, **{name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in more.items()}}


def with_predicting_layer(tensors: Tensors) -> Tensors:
    """Besides the model, what predicts more than one token: of GLM-4.5, as one more layer."""
    import torch

    last = max(int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.(\d+)\.", name)))
    old, new = f"model.layers.{last}.", f"model.layers.{last + 1}."
    more = {new + name.removeprefix(old): tensor.clone() for name, tensor in tensors.items() if name.startswith(old)}
    more[f"{new}eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
    return {**tensors, **more}


LAYOUTS = {
    "gpt_oss_mxfp4": Layout(family="gpt_oss", change=to_mxfp4, config=dict(quantization_config=MXFP4), unpacks=True),
    "qwen3_moe_fused": Layout(family="qwen3_moe", change=fuse_experts),
    "qwen3_5_moe_fused": Layout(family="qwen3_5_moe", change=fuse_experts),
    "gemma3_model_first": Layout(family="gemma3", change=model_first),
    "mistral3_model_first": Layout(family="mistral3", change=model_first),
    "qwen3_5_mtp": Layout(family="qwen3_5", change=with_predictor),
    "glm4_moe_mtp": Layout(family="glm4_moe", change=with_predicting_layer, config=dict(num_nextn_predict_layers=1)),
}
