"""The peers' model: a Llama of the same geometry with random weights, packed by bitsandbytes, adapted by PEFT.

It is built on the device and packed there, so that neither a checkpoint nor the memory of a 16-bit copy on the host is
needed. What comes out is what `from_pretrained` with a BitsAndBytesConfig gives: Linear4bit in place of every linear
layer but the output layer, NF4 with double quantization, bfloat16 compute.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers


def plain_model(geometry: Path, device: str, attention: str):
    """A bfloat16 model with transformers' random initialization."""
    config = transformers.AutoConfig.for_model(**json.loads(geometry.read_text()))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        ).requires_grad_(False)


def pack(linear: torch.nn.Linear) -> torch.nn.Module:
    """bitsandbytes' layer with the weight of `linear`."""
    with torch.device("meta"):
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
    weight = linear.weight.detach()
    packed.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    ).to(weight.device)
    packed.bias = linear.bias
    return packed


def packed_model(geometry: Path, device: str, attention: str):
    """The model with every linear layer but the output layer packed, layer by layer."""
    model = plain_model(geometry, device, attention)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, pack(module))
    model.is_loaded_in_4bit = True  # by this PEFT chooses its 4-bit layers
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def adapted(model, rank: int, *, upcast: bool):
    """The model with LoRA on all linear layers and gradient checkpointing.

    Args:
      upcast: PEFT's recipe, which turns every parameter that is not packed into float32; without it all stays bfloat16.
    """
    checkpointing = {"use_reentrant": False}
    if upcast:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora).train()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
