"""Rotary frequencies for texts within and beyond the length that a model was made for, as transformers has them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qlora_jax.io.hf import load_model
from qlora_jax.io.model_config import parse_config
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.rope import rope_tables
from qlora_jax.quant.rules import rules_for
from tests.conftest import SIZES

FACTORS = dict(short_factor=[1 + 0.1 * i for i in range(8)], long_factor=[1.5 + i for i in range(8)])
SCALINGS = {
    "default": {},
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=8.0, original_max_position_embeddings=32),
    "yarn, all fields": dict(
        factor=8.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3
    ),
    "yarn, magnitudes": dict(
        factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.2, truncate=False
    ),
    "yarn, no original length": dict(factor=2.0),
    "longrope": dict(factor=8.0, original_max_position_embeddings=32, **FACTORS),
    "longrope, factor from the lengths": dict(original_max_position_embeddings=32, **FACTORS),
}
LENGTHS = (20, 64, 150)


def settings(name: str) -> dict:
    rope = dict(rope_type=name.split(",")[0], rope_theta=10000.0, **SCALINGS[name])
    return {**SIZES, "model_type": "llama", "max_position_embeddings": 64, "rope_parameters": rope}


def by_transformers(config: transformers.LlamaConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of a text's positions `[T, head_dim / 2]`, from a module that has seen no other text."""
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    half = config.head_dim // 2
    return tuple(t[0, :, :half].numpy() for t in module(torch.zeros(1), torch.arange(length)[None]))


def ours(config, positions, lengths) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.asarray(t)[0, :, 0] for t in rope_tables(config.layers[0].rope, positions, lengths))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, length):
    values = settings(name)
    theirs = by_transformers(transformers.AutoConfig.for_model(**values), length)
    got = ours(parse_config(values), jnp.arange(length)[None], jnp.full((1, 1), length))
    for a, b in zip(got, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_the_longest_text():
    longest = {name: parse_config(settings(name)).max_position for name in SCALINGS}
    stretched = {"dynamic": 128, "yarn": 256, "yarn, all fields": 256, "yarn, magnitudes": 128}
    assert longest == dict.fromkeys(SCALINGS, 64) | stretched | {"yarn, no original length": 128}


def test_every_scaling_is_felt():
    tables = {}
    for name in SCALINGS:
        got = ours(parse_config(settings(name)), jnp.arange(150)[None], jnp.full((1, 1), 150))
        tables[name] = np.stack(got)
    names = [name for name in SCALINGS if name != "longrope, factor from the lengths"]
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(tables[one] - tables[other]).max() > 1e-2, (one, other)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(name)`: (ours, transformers') with attention that looks at positions."""

    def make(name):
        torch.manual_seed(0)
        theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**settings(name))).eval()
        for layer in theirs.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                torch.nn.init.normal_(weight, 0, 0.3)
        theirs.save_pretrained(folder := tmp_path_factory.mktemp("rope"))
        return load_model(folder, dtype="float32", rules=rules_for("none")).model, theirs

    return make


@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope"])
def test_packed_documents_are_rotated_by_their_own_lengths(name, models):
    model, theirs = models(name)
    tokens = np.random.default_rng(0).integers(0, 160, 120)
    lengths = (20, 100)
    segments = np.repeat([1, 2], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    got = model.logits(model.hidden(jnp.asarray(tokens)[None], jnp.asarray(positions), jnp.asarray(segments)))[0]
    start = 0
    for n in lengths:
        alone = model(jnp.asarray(tokens[start : start + n])[None])[0]
        np.testing.assert_allclose(got[start : start + n], alone, atol=1e-4)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[None, start : start + n])).logits[0].numpy()
        np.testing.assert_allclose(alone, expected, atol=1e-4)
        theirs = models(name)[1]  # one that has seen no longer text
        start += n


@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope"])
def test_a_prompt_in_a_cache_is_rotated_as_a_whole(name, models):
    model, theirs = models(name)
    tokens = np.random.default_rng(0).integers(0, 160, (1, 100))
    x, _ = model.step(jnp.asarray(tokens), empty_cache(model.config, 1, 100, jnp.float32))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    "rope, words",
    [
        (dict(rope_type="linear"), "factor"),
        (dict(rope_type="linear", factor=None), "factor is None, expected a number above 0"),
        (dict(rope_type="linear", factor="4"), "factor is '4'"),
        (dict(rope_type="dynamic", factor=0.5), "factor is 0.5, expected a number from 1 on"),
        (dict(rope_type="yarn", factor=True, original_max_position_embeddings=32), "factor is True"),
        (
            dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=0),
            "original_max_position_embeddings is 0",
        ),
        (dict(rope_type="longrope", factor=2.0, original_max_position_embeddings=32), "short_factor"),
        (SCALINGS["longrope"] | dict(rope_type="longrope", long_factor=[1.0]), "long_factor has 1 numbers, expected 8"),
        (SCALINGS["longrope"] | dict(rope_type="longrope", long_factor=[None] * 8), "long_factor is None"),
        (SCALINGS["llama3"] | dict(rope_type="llama3", low_freq_factor=9), "low_freq_factor 9.0 must be below"),
        (dict(rope_type="mrope"), "rope_type 'mrope' is not supported, only default"),
        (dict(rope_type=["yarn"]), "rope_type"),
        (dict(partial_rotary_factor="half"), "partial_rotary_factor is 'half'"),
        (dict(rope_theta=None), "rope_theta is None, expected a number above 0"),
    ],
)
def test_wrong_parameters_are_named(rope, words):
    values = settings("default") | {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    with pytest.raises((ValueError, NotImplementedError), match=words.replace("[", r"\[")):
        parse_config(values)
