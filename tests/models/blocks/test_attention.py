"""What the decoder tells attention about documents, windows and the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.hf import random_model
from qlora_jax.models import Decoder, table
from qlora_jax.models.blocks.context import Context, document_starts, first_keys
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.specs import LayerKind
from tests.tiny_config import CONFIG, MIXER

LONG = 200  # more queries than the reference takes


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0, dtype="float32").model


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 97, shape), jnp.int32)


def test_document_starts():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert document_starts(segments).tolist() == [[0, 0, 0, 3, 4, 4, 6, 6], [0] * 8]


def test_first_keys():
    context = Context(None, {}, jnp.asarray([[0, 0, 0, 0, 4, 4]]), 0)
    assert first_keys(context, jnp.int32(0)).tolist() == [[0, 0, 0, 0, 4, 4]]
    assert first_keys(context, jnp.int32(2)).tolist() == [[0, 0, 1, 2, 4, 4]]
    cached = Context(None, {}, jnp.asarray([[3, 3]]), jnp.int32(7))
    assert first_keys(cached, jnp.int32(5)).tolist() == [[3, 4]]
    rows = Context(None, {}, jnp.asarray([[0, 0], [0, 0]]), jnp.asarray([7, 2]))
    assert first_keys(rows, jnp.int32(5)).tolist() == [[3, 4], [0, 0]]


def test_long_packed_documents_have_the_logits_they_have_alone(model):
    text = tokens(1, LONG)
    cut = 120
    segments, positions = jnp.asarray([[1] * cut + [2] * (LONG - cut)]), jnp.arange(LONG) % cut
    packed = model(text, positions[None], segments)
    for part in (slice(0, cut), slice(cut, LONG)):
        np.testing.assert_allclose(packed[:, part], model(text[:, part]), rtol=1e-4, atol=1e-5)


def test_a_long_prompt_through_the_cache_equals_the_whole_text(model):
    """Windows differ from layer to layer: 0, 6, 0."""
    text = tokens(2, LONG + 2)
    whole = model(text)
    cache, pieces = empty_cache(CONFIG, 2, LONG + 5, jnp.float32), []
    for part in (slice(0, LONG), slice(LONG, LONG + 1), slice(LONG + 1, LONG + 2)):
        hidden, cache = jax.jit(model.step)(text[:, part], cache)
        pieces.append(model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [20, LONG])
def test_the_soft_cap_of_a_configuration_is_applied(model, length):
    """A huge cap changes nothing; a tiny one makes all scores alike, so that attention is the mean of the values."""
    values = {path: _value(model, path) for path in table(CONFIG)}
    text = tokens(1, length)

    def logits(soft_cap):
        kind = LayerKind(dataclasses.replace(MIXER, soft_cap=soft_cap), CONFIG.kinds[0].feed_forward)
        layers = tuple(layer._replace(kind=kind) for layer in CONFIG.layers)
        return Decoder(dataclasses.replace(CONFIG, layers=layers), values)(text)

    np.testing.assert_allclose(logits(1e4), model(text), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(logits(1e-3) - model(text)).max()) > 1e-4


def _value(model, path):
    node = model
    for name in path.split("."):
        node = getattr(node, name)
    return node.get_value()
