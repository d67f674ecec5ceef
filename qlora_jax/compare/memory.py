"""What the three methods need for a 7B model: weights by their shapes, a train step by XLA's compiler or arithmetic."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax

from qlora_jax.compare.methods import MAIN
from qlora_jax.config import Config, LoraSection, ModelSection, QuantSection, TrainSection
from qlora_jax.device.facts import device_bytes
from qlora_jax.memory.compile import CompilerMissing, compile_for
from qlora_jax.memory.plan import Planner
from qlora_jax.memory.train_step import abstract_batch, abstract_state, dropout_key
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import AttentionSpec, LayerKind, LayerSpec, MLPSpec, NormSpec, Rope
from qlora_jax.models.table import count_parameters

# configs/geometry/llama-2-7b.json, to which a test holds it: an installed package has no configs/.
LAYER = LayerSpec(
    LayerKind(AttentionSpec(heads=32, kv_heads=32, head_dim=128), MLPSpec(inner=11008)),
    rope=Rope(theta=10000.0, dims=128),
)
LLAMA_2_7B = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    layers=(LAYER,) * 32,
    norm=NormSpec(eps=1e-5),
    max_position=4096,
)
# As configs/7b.py, rank 8 on the query and value projections and one row of 512 tokens, but with the embedding on the
# device: the rows show what a whole model takes there.
CONFIG = Config(
    model=ModelSection(weights="random"),
    quant=QuantSection(embedding="nf4", lm_head="int8"),
    lora=LoraSection(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    train=TrainSection(steps=1, batch_size=1, grad_accum=16, seq_len=512, vocab_chunk=4096),
)
# The card that is compiled for: the only one in the project's list that comes near a full fine-tune's peak.
GPU = "h200"


def memory_in_a_process(gpu: str | None) -> dict[str, Any]:
    """`memory_of_7b` in a process that has no GPU: in this one JAX may have one, and then cannot compile for another.

    Raises:
      RuntimeError: with the process's last words.
    """
    silent = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "qlora_jax.compare.memory", *([] if gpu is None else [gpu])]
    done = subprocess.run(command, env=silent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of a 7B model could not be planned: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def memory_of_7b(gpu: str | None) -> dict[str, Any]:
    """The memory section of compare.json, compiled for a key of GPUS; by arithmetic where None or that is not possible.

    A row's `weights_bytes` are the stored base alone (what 28, 14 and 3.5 GB stand for), `total_bytes` the peak of a
    train step: with adapters, gradients, optimizer state and activations. `not_compiled` says why arithmetic stands in.
    """
    peaks, reason = compiled_peaks(gpu) if gpu is not None else ({}, "not asked for")
    return {
        "model": "Llama-2-7B",
        "tokens": CONFIG.train.batch_size * CONFIG.train.seq_len,
        "gpu": gpu if peaks else None,
        "how": f"compiled by XLA for {gpu}" if peaks else "arithmetic of scripts/plan.py",
        "not_compiled": reason,
        "rows": [row(method.name, peaks.get(method.name)) for method in reversed(MAIN)],
    }


def row(method: str, peak: int | None) -> dict[str, Any]:
    """One method's weights and total, in bytes; `peak` as the compiler states it."""
    config = config_of(method)
    breakdown = Planner(config, LLAMA_2_7B).at(config.train.batch_size, config.train.seq_len)
    trainable, parameters = trained(config), count_parameters(LLAMA_2_7B)
    return {
        "method": method,
        "dtype": "nf4" if method == "qlora" else config.model.dtype,
        "parameters": parameters,
        "trainable": trainable,
        "trainable_share": trainable / parameters,
        "weights_bytes": breakdown.base,
        "total_bytes": breakdown.peak if peak is None else peak,
        "compiled": peak is not None,
        "arithmetic_bytes": breakdown.peak,
    }


def config_of(method: str) -> Config:
    """The 7B configuration of a method."""
    [change] = [one.change for one in MAIN if one.name == method]
    # A head that is trained in slices needs a second buffer of gradients, of the whole model's size.
    train = dataclasses.replace(CONFIG.train, vocab_chunk=0) if method == "full" else CONFIG.train
    return change(dataclasses.replace(CONFIG, train=train))


def trained(config: Config) -> int:
    """Parameters that are trained; an adapter's scale is none."""
    parts = abstract_state(config, LLAMA_2_7B).parts
    return sum(leaf.size for leaf in jax.tree.leaves(parts.trained))


def compiled_peaks(gpu: str) -> tuple[dict[str, int], str | None]:
    """({method: the peak that XLA states for its train step}, None); or ({}, why they cannot be compiled)."""
    peaks = {}
    try:
        for method in MAIN:
            config = config_of(method.name)
            state = abstract_state(config, LLAMA_2_7B)
            batch, key = abstract_batch(config, state.parts.base), dropout_key(config)
            arguments = (state.parts.trained, state.opt_state, state.parts.base, batch, key)
            peaks[method.name] = device_bytes(compile_for(state.train_step, arguments, gpu))["peak"]
    except (CompilerMissing, jax.errors.JaxRuntimeError) as error:
        return {}, str(error).splitlines()[0]
    return peaks, None


if __name__ == "__main__":
    print(json.dumps(memory_of_7b(sys.argv[1] if len(sys.argv) > 1 else None)))
