"""Mixers that keep states: in pieces, beside padding and beside rows that do nothing, as in one go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generation import Generator
from qlora_jax.io.hf import random_model
from qlora_jax.models.adapters import linears
from qlora_jax.models.cache import Cache, can_be_cut, empty_cache
from qlora_jax.models.segments import segments
from qlora_jax.models.specs import DeltaSpec, NormSpec
from qlora_jax.models.table import table
from tests.tiny_config import CONFIG, CONVOLUTION, DELTA, HYBRID

LENGTH, PLACES = 21, 32


@pytest.fixture(scope="module")
def model():
    """With matrices so large that each layer's part is seen."""
    model = random_model(dataclasses.replace(HYBRID, initializer_range=0.15), 0, dtype="float32").model
    for _, linear in linears(model):
        if linear.bias is not None:
            linear.bias.set_value(jnp.full_like(linear.bias.get_value(), 0.1))
    return model


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, LENGTH)), jnp.int32)


@pytest.fixture(scope="module")
def whole(model, tokens):
    return jax.jit(model.hidden)(tokens)


@pytest.fixture(scope="module")
def step(model):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda *arguments: nnx.merge(graphdef, state).step(*arguments))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def filled(cache, value):
    """The cache as texts before have left it."""
    return cache._replace(layers=jax.tree.map(lambda a: jnp.full_like(a, value), cache.layers))


def test_a_unit_of_every_mixer_is_one_scan():
    assert [[stack.name for stack in unit] for unit in segments(HYBRID)] == [[f"layers_{i}" for i in range(4)]]
    cache = empty_cache(HYBRID, 3, PLACES, jnp.bfloat16)
    shapes = {name: [(a.shape, a.dtype.name) for a in layers] for name, layers in cache.layers.items()}
    delta = [((2, 3, 3, 80), "bfloat16"), ((2, 3, 4, 8, 12), "float32")]
    assert shapes["layers_0"] == shapes["layers_2"] == delta
    assert shapes["layers_1"] == [((2, 3, 2, 64), "bfloat16")]
    assert not can_be_cut(HYBRID) and can_be_cut(CONFIG)


def test_a_text_in_pieces_is_the_text(step, tokens, whole):
    cache, found = empty_cache(HYBRID, 3, PLACES, jnp.float32), []
    for start, stop in ((0, 12), (12, 13), (13, 20), (20, 21)):
        y, cache = step(tokens[:, start:stop], cache)
        found.append(y)
    close(jnp.concatenate(found, 1), whole)


@pytest.mark.parametrize("left", [0.5, jnp.nan, jnp.inf])
def test_a_new_text_sees_nothing_of_the_rows_last_one(step, tokens, whole, left):
    cache = filled(empty_cache(HYBRID, 3, PLACES, jnp.float32), left)
    # Attention never reads what lies behind a text, but 0 · NaN is NaN: serving clears such a row.
    layers = cache.layers | {"layers_3": jax.tree.map(jnp.zeros_like, cache.layers["layers_3"])}
    y, _ = step(tokens, Cache(layers, jnp.zeros(3, jnp.int32)))
    close(y, whole)


def test_rows_of_different_lengths_with_padding(step, tokens, whole):
    counts = jnp.asarray([5, 12, 1])
    y, cache = step(tokens[:, :12], empty_cache(HYBRID, 3, PLACES, jnp.float32), counts)
    for row, count in enumerate(counts.tolist()):
        close(y[row, :count], whole[row, :count])
    for _ in range(3):
        own = cache.length
        y, cache = step(jnp.take_along_axis(tokens, own[:, None], 1), cache)
        close(y[:, 0], whole[jnp.arange(3), own])


def test_a_row_that_does_nothing_keeps_its_states_to_the_bit(step, tokens, whole):
    _, cache = step(tokens[:, :9], empty_cache(HYBRID, 3, PLACES, jnp.float32))
    full = jnp.asarray([9, PLACES, 9])
    y, after = step(tokens[:, 9:10], Cache(cache.layers, full), jnp.asarray([1, 0, 1]))
    close(y[::2, 0], whole[::2, 9])
    for name, layers in cache.layers.items():
        for before, now in zip(layers, after.layers[name], strict=True):
            np.testing.assert_array_equal(before[:, 1], now[:, 1])
            assert name == "layers_3" or float(jnp.abs(before[:, 0] - now[:, 0]).max()) > 0
    y, _ = step(tokens[:, 9:10], Cache(after.layers, jnp.asarray([PLACES, 9, PLACES])), jnp.asarray([0, 1, 0]))
    close(y[1, 0], whole[1, 9])


def test_a_piece_for_one_row_leaves_the_others_alone(step, tokens, whole):
    _, cache = step(tokens[:, :9], empty_cache(HYBRID, 3, PLACES, jnp.float32))
    cache = cache._replace(length=jnp.asarray([9, 0, 9]))
    y, after = step(tokens[:1, :16], cache, jnp.asarray([13]), jnp.int32(1))
    close(y[0, :13], whole[0, :13])
    assert after.length.tolist() == [9, 13, 9]
    for layers, now in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(layers[:, ::2], now[:, ::2])
    y, _ = step(tokens[:1, 13:14], after, jnp.asarray([1]), jnp.int32(1))
    close(y[0, 0], whole[0, 13])


def test_packed_documents_are_each_alone(model, tokens, whole):
    row = jnp.concatenate([tokens[0, :8], tokens[1, :13]])[None]
    positions = jnp.concatenate([jnp.arange(8), jnp.arange(13)])[None]
    y = jax.jit(model.hidden)(row, positions, jnp.asarray([[1] * 8 + [2] * 13]))
    close(y[0, :8], whole[0, :8])
    close(y[0, 8:], whole[1, :13])


def test_what_is_packed_and_what_is_adapted():
    params = {path.removeprefix("layers_0."): param for path, param in table(HYBRID).items() if "layers_0." in path}
    delta = {path.removeprefix("linear_attn."): p.role for path, p in params.items() if path.startswith("linear_attn")}
    assert delta == {
        "in_proj_qkv.weight": "projection",
        "in_proj_z.weight": "projection",
        "in_proj_b.weight": "gate",
        "in_proj_a.weight": "gate",
        "conv1d.weight": "array",
        "dt_bias": "array",
        "A_log": "array",
        "norm.weight": "norm",
        "out_proj.weight": "projection",
    }
    short = {path: p.shape for path, p in table(HYBRID).items() if path.startswith("layers_1.conv.")}
    assert {path.removeprefix("layers_1.conv."): shape for path, shape in short.items()} == {
        "in_proj.weight": (192, 64),
        "in_proj.bias": (192,),
        "conv.weight": (64, 1, 3),
        "conv.bias": (64,),
        "out_proj.weight": (64, 64),
        "out_proj.bias": (64,),
    }


def test_sizes_of_a_plan():
    assert DELTA.widths == (48, 16) and CONVOLUTION.widths == (64, 64)
    with pytest.raises(ValueError, match="linear_num_value_heads=3 must be a multiple of linear_num_key_heads=2"):
        DeltaSpec(key_heads=2, value_heads=3, key_dim=8, value_dim=8, kernel=4, norm=NormSpec(eps=1e-5))


def test_prompts_of_different_lengths_are_generated_from_as_each_alone(model, tokens):
    generator = Generator(*nnx.split(model), stop_ids=())
    prompts = [tokens[row, :length].tolist() for row, length in enumerate((5, 12, 1))]
    together = generator.generate(prompts, max_new_tokens=[6] * 3)
    assert together == [generator.generate([prompt], max_new_tokens=[6])[0] for prompt in prompts]
    assert len({tuple(ids) for ids in together}) == 3
