"""Generation from a 7B model with random weights: tokens per second, and how near that is to reading them just once."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.gpu import fill
from benchmarks.gpu.context import Context, reason
from benchmarks.gpu.names import BF16, NF4, decode_name
from benchmarks.gpu.timing import median_seconds
from qlora_jax.config import QuantSection
from qlora_jax.generation.decode import Generator
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.models.config import ModelConfig
from qlora_jax.quant.rules import AS_HELD, packed

REPEATS = 3
FLOOR_BAR = (">=", 0.40)
LEAST = 45


def prompts(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """Random prompts of equal length."""
    rng = np.random.default_rng(batch)
    return rng.integers(3, config.vocab_size, (batch, length)).tolist()


def per_token(generate: Callable[[int], Any], new: int) -> tuple[float, float]:
    """(seconds of a decoding step, seconds until the first token): what all tokens take beyond the first one's time."""
    generate(1), generate(new)
    first = median_seconds(lambda: generate(1), REPEATS)
    return (median_seconds(lambda: generate(new), REPEATS) - first) / (new - 1), first


def bytes_per_step(config: ModelConfig, state: Any, batch: int, prompt: int, new: int) -> int:
    """The fewest bytes that a step reads: every weight but the embedding's table once, and the filled cache."""
    arrays = jax.tree_util.tree_leaves_with_path(state)
    weights = sum(leaf.nbytes for path, leaf in arrays if "embed_tokens" not in jax.tree_util.keystr(path))
    if config.tie_embeddings:
        weights = sum(leaf.nbytes for _, leaf in arrays)
    slots = prompt + new // 2
    keys = sum(kind.mixer.widths[1] for kind in config.kinds)
    return weights + 2 * 2 * batch * slots * keys


def run_batch(context: Context, config: ModelConfig, generator: Generator, weights: str, batch: int) -> None:
    """Both rows of one batch size."""
    sizes = context.sizes
    given = prompts(config, batch, sizes.prompt)
    generate = lambda new: generator.generate(given, max_new_tokens=new)  # noqa: E731
    began = time.perf_counter()
    seconds, first = per_token(generate, sizes.new_tokens)
    name = decode_name(weights, batch)
    if seconds <= 0:
        context.missing(name, "tokens/s", f"not measured: {sizes.new_tokens} tokens took no longer than one")
        return
    note = f"first token after {first * 1e3:.3g} ms; measured in {time.perf_counter() - began:.0f} s"
    context.row(name, batch / seconds, "tokens/s", note=note)
    if not context.bandwidth:
        context.missing(f"{name}: byte floor", "us", "not measured: no bandwidth")
        return
    floor = bytes_per_step(config, generator.state, batch, sizes.prompt, sizes.new_tokens) / context.bandwidth
    bar = FLOOR_BAR if (weights, batch) == (NF4, 1) else None
    context.row(f"{name}: byte floor", seconds * 1e6, "us", reference=floor * 1e6, inverse=True, bar=bar)


def run_weights(context: Context, weights: str) -> None:
    config = read_config(context.sizes.geometry)
    model = abstract_model(config, rules=packed(QuantSection()) if weights == NF4 else AS_HELD)
    graphdef, state = nnx.split(model)
    generator = Generator(graphdef, fill.random_state(state), stop_ids=())
    for batch in context.sizes.batches:
        name = decode_name(weights, batch)
        if context.late(name, "tokens/s", LEAST):
            continue
        try:
            run_batch(context, config, generator, weights, batch)
        except Exception as error:  # a batch that does not fit must not hide the smaller ones
            context.missing(name, "tokens/s", f"failed: {reason(error)}")


def run_packed(context: Context) -> None:
    context.require("auto")
    context.require("auto", "matmul")
    run_weights(context, NF4)


def run_plain(context: Context) -> None:
    run_weights(context, BF16)
