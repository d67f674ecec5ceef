"""Decoders of several kinds of layers: which are scanned together, and that this changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, Pieces, QuantSection
from qlora_jax.io.hf import random_model
from qlora_jax.models import Decoder
from qlora_jax.models.adapters import add_adapters, linears
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.segments import segments, stacks
from qlora_jax.models.specs import LayerSpec, MLPSpec
from qlora_jax.models.table import checkpoint, table
from qlora_jax.quant.rules import packed
from tests import tiny_config

PLAIN = tiny_config.KIND
WIDE = PLAIN._replace(feed_forward=MLPSpec(inner=256))


def config_of(kinds):
    layers = [LayerSpec(kind, 0 if i % 2 else 5, tiny_config.ROPE) for i, kind in enumerate(kinds)]
    return dataclasses.replace(tiny_config.CONFIG, layers=tuple(layers))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([PLAIN] * 3, [[("layers", [0, 1, 2])]]),
        ([PLAIN, WIDE] * 3, [[("layers_0", [0, 2, 4]), ("layers_1", [1, 3, 5])]]),
        (
            [PLAIN, PLAIN, WIDE] * 2 + [PLAIN],
            [[("layers_0", [0, 3]), ("layers_1", [1, 4]), ("layers_2", [2, 5])], [("layers_6", [6])]],
        ),
        ([WIDE, PLAIN, PLAIN, PLAIN], [[("layers_0", [0])], [("layers_1", [1, 2, 3])]]),
    ],
)
def test_layers_that_repeat_are_scanned_together(kinds, expected):
    found = [[(stack.name, list(stack.layers)) for stack in segment] for segment in segments(config_of(kinds))]
    assert found == expected


def alone(model: Decoder, config) -> list[Decoder]:
    """Decoders of one layer each, which together hold the model's layers."""
    found = {}
    for stack in stacks(config):
        for place, layer in enumerate(stack.layers):
            one = dataclasses.replace(config, layers=(config.layers[layer],))
            values = {}
            for path in table(one):
                own = path.replace("layers.", f"{stack.name}.") if path.startswith("layers.") else path
                value = weight(model, own)
                values[path] = value[place][None] if path.startswith("layers.") else value
            found[layer] = Decoder(one, values)
    return [found[layer] for layer in range(config.num_layers)]


def weight(model, path):
    node = model
    for name in path.split("."):
        node = getattr(node, name)
    return node.get_value()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoder_of_segments_is_its_layers_one_after_the_other(remat):
    config = config_of([PLAIN, PLAIN, WIDE] * 2 + [PLAIN])
    model = random_model(config, 0, dtype="float32").model
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    parts = alone(model, config)
    x = model.embed_tokens(tokens)
    for part in parts:
        part.norm.weight.set_value(jnp.ones_like(part.norm.weight.get_value()))
        x = without_norm(part, tokens, x)
    np.testing.assert_allclose(hidden(model, tokens, remat), model.norm(x), rtol=2e-5, atol=2e-6)


def without_norm(part, tokens, x):
    part.norm = lambda value: value
    return part.hidden(tokens, embedded=x)


def hidden(model, tokens, remat):
    return jax.jit(lambda: model.hidden(tokens, pieces=Pieces(remat=remat)))()


def test_generation_keeps_a_cache_for_each_stack():
    config = config_of([PLAIN, WIDE] * 2 + [PLAIN])
    model = random_model(config, 0, dtype="float32").model
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    cache = empty_cache(config, 2, 12, jnp.float32)
    assert {name: layers.k.shape[0] for name, layers in cache.layers.items()} == {
        "layers_0": 2,
        "layers_1": 2,
        "layers_4": 1,
    }
    first, cache = model.step(tokens[:, :6], cache)
    second, cache = model.step(tokens[:, 6:], cache)
    whole = model.hidden(tokens)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=2e-5, atol=2e-6)


def test_adapters_and_names_follow_the_stacks():
    config = config_of([PLAIN, WIDE] * 2)
    names = checkpoint(config)
    [part] = names["model.layers.3.mlp.up_proj.weight"]
    assert (part.tensor.param.path, part.tensor.place) == ("layers_1.mlp.up_proj.weight", (1,))
    model = random_model(config, 0, dtype="float32", rules=packed(QuantSection())).model
    targets = add_adapters(model, LoraSection(rank=2, targets=("up_proj",)), jax.random.key(0))
    assert list(targets) == [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
    shapes = {path: linear.lora.B.get_value().shape for path, linear in linears(model) if linear.lora is not None}
    width = 128
    assert shapes == {"layers_0.mlp.up_proj": (2, width, 2), "layers_1.mlp.up_proj": (2, 2 * width, 2)}
    tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, config.vocab_size)
    graphdef, adapters, base = nnx.split(model, nnx.Param, ...)
    gradient = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, base).hidden(tokens) ** 2))(adapters)
    assert all(
        float(jnp.abs(stack["mlp"]["up_proj"]["lora"]["B"].get_value()).max()) > 0 for stack in gradient.values()
    )
