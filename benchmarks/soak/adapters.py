"""Adapters with random weights, large enough that each of them says something else."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.generate import Generator
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import attach_adapter, read_adapter, write_adapter
from qlora_jax.lora import LoraConfig
from qlora_jax.models.adapters import add_adapters, linears

SIZE = 0.3  # standard deviation of B


def write_random(folder: Path, base: Path, seed: int, rank: int) -> None:
    """A PEFT folder with an adapter of all linear layers."""
    loaded = load_model(base, dtype="float32", quant="nf4")
    config = LoraConfig(rank=rank, targets="all-linear")
    targets = add_adapters(loaded.model, config, jax.random.key(seed))
    random = np.random.default_rng(seed)
    for _, linear in linears(loaded.model):
        shape = linear.lora.B.get_value().shape
        linear.lora.B.set_value(jax.numpy.asarray(random.normal(0, SIZE, shape), np.float32))
    extra = {"method": "qlora", **dataclasses.asdict(Quantization())}
    write_adapter(folder, loaded.model, config, targets, base=base.name, base_hash=loaded.content_hash, extra=extra)


def answers_alone(
    base: Path, adapters: Mapping[str, Path | None], prompts: Sequence[list[int]], tokenizer: Tokenizer, new: int
) -> dict[str, list[str]]:
    """What each model says after each prompt by itself, greedily, by the way that generate.py takes."""
    return {name: _alone(base, folder, prompts, tokenizer, new) for name, folder in adapters.items()}


def _alone(base: Path, adapter: Path | None, prompts: Sequence[list[int]], tokenizer: Any, new: int) -> list[str]:
    loaded = load_model(base, dtype="float32", quant="nf4", quantization=Quantization())
    if adapter is not None:
        attach_adapter(loaded.model, read_adapter(adapter), base_hash=loaded.content_hash)
    generator = Generator(*nnx.split(loaded.model), stop_ids=[tokenizer.eos_token_id])
    found = [generator.generate([prompt], max_new_tokens=new)[0] for prompt in prompts]
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in found]
