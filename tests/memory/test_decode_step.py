"""The decode step that is compiled for GPUs is the one that generation runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import Config, ModelSection, QuantSection
from qlora_jax.generation.decode import Generator
from qlora_jax.io.hf import random_model, read_config
from qlora_jax.memory.decode_step import abstract_decode_step
from qlora_jax.models.cache import empty_cache
from qlora_jax.quant.rules import packed

GEOMETRY = Path(__file__).parents[2] / "demo" / "base" / "config.json"
CONFIG = Config(model=ModelSection(weights="random", geometry=str(GEOMETRY), dtype="fp32"))
PROMPT = [1, 7, 300, 12]


def shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def test_it_generates_what_the_generator_does():
    step, (base, abstract_cache, tokens) = abstract_decode_step(CONFIG, batch=1, places=16)
    geometry = read_config(GEOMETRY)
    graphdef, state = nnx.split(random_model(geometry, 0, dtype="float32", rules=packed(QuantSection())).model)
    cache = empty_cache(geometry, 1, 16, "float32")
    assert shapes((state, cache)) == shapes((base, abstract_cache))
    text = list(PROMPT)
    for position in range(8):
        token = jnp.full(tokens.shape, text[position], tokens.dtype)
        following, cache = step(state, cache, token)
        if position + 1 == len(text):
            text.append(int(following[0, 0]))
    assert [text[len(PROMPT) :]] == Generator(graphdef, state, stop_ids=()).generate([PROMPT], max_new_tokens=5)
