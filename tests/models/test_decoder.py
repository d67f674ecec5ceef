import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, Pieces, QuantSection
from qlora_jax.io.hf import random_model
from qlora_jax.models import Decoder, ModelConfig, count_parameters, table
from qlora_jax.models.adapters import TRAINABLE, add_adapters
from qlora_jax.models.blocks.layer import in_chunks
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.specs import AttentionSpec
from qlora_jax.quant.rules import packed
from tests.tiny_config import CONFIG, windowed


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0, dtype="float32", rules=packed(QuantSection())).model


def tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, shape), jnp.int32)


def test_a_packed_document_has_the_logits_it_has_alone(model):
    lengths = [9, 17, 6]
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed = jnp.concatenate([*documents, jnp.zeros((1, 8), jnp.int32)], axis=1)
    segments = jnp.asarray([[s for s, n in enumerate(lengths, 1) for _ in range(n)] + [0] * 8])
    positions = jnp.asarray([[i for n in [*lengths, 8] for i in range(n)]])
    logits, start = model(packed, positions, segments), 0
    for document, length in zip(documents, lengths, strict=True):
        np.testing.assert_allclose(logits[:, start : start + length], model(document), rtol=1e-5, atol=1e-5)
        start += length


def test_without_segments_documents_would_see_each_other(model):
    both = tokens(1, 20)
    apart = model(both, jnp.asarray([[*range(10), *range(10)]]), jnp.asarray([[1] * 10 + [2] * 10]))
    assert float(jnp.abs(apart[:, 10:] - model(both)[:, 10:]).max()) > 1e-2


def test_padding_does_not_change_the_tokens_before_it(model):
    text = tokens(1, 12)
    padded = jnp.pad(text, ((0, 0), (0, 5)))
    segments = jnp.asarray([[1] * 12 + [0] * 5])
    np.testing.assert_allclose(model(padded, None, segments)[:, :12], model(text), rtol=1e-5, atol=1e-5)


def test_a_window_hides_what_lies_further_back():
    model = random_model(CONFIG, 0, dtype="float32").model
    wide = Decoder(
        windowed(0, 0, 0),
        {path: _value(model, path) for path in table(CONFIG)},
    )
    text = tokens(1, 12)
    np.testing.assert_allclose(model(text)[:, :6], wide(text)[:, :6], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(model(text)[:, 7:] - wide(text)[:, 7:]).max()) > 1e-4


def _value(model, path):
    node = model
    for name in path.split("."):
        node = getattr(node, name)
    return node.get_value()


def test_steps_through_the_cache_equal_the_whole_text(model):
    text = tokens(2, 11)
    whole = model(text)
    cache = empty_cache(CONFIG, 2, 16, jnp.float32)
    hidden, cache = model.step(text[:, :5], cache)
    pieces = [model.logits(hidden)]
    for i in range(5, 11):
        hidden, cache = model.step(text[:, i : i + 1], cache)
        pieces.append(model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4)
    assert int(cache.length) == 11


def test_rows_of_a_cache_have_lengths_of_their_own(model):
    """Padding after a row's tokens is invisible, and the next tokens take its place."""
    text, counts = tokens(2, 11), jnp.asarray([6, 9])
    first = jnp.where(jnp.arange(9) < counts[:, None], text[:, :9], 5)
    hidden, cache = model.step(first, empty_cache(CONFIG, 2, 16, jnp.float32), counts)
    assert cache.length.tolist() == [6, 9]
    following, cache = model.step(jnp.stack([text[0, 6:8], text[1, 9:]]), cache)
    assert cache.length.tolist() == [8, 11]
    for row, count in enumerate((6, 9)):
        pieces = jnp.concatenate([hidden[row, :count], following[row]])
        whole = model(text[row : row + 1, : count + 2])[0]
        np.testing.assert_allclose(model.logits(pieces), whole, rtol=1e-4, atol=1e-4)


def test_one_row_of_a_cache_goes_on_and_the_others_stay(model):
    text = tokens(3, 8)
    _, cache = model.step(text[:, :5], empty_cache(CONFIG, 3, 16, jnp.float32), jnp.asarray([5, 4, 5]))
    kept = jax.tree.map(jnp.copy, cache)
    hidden, cache = model.step(text[1:2, 4:], cache, jnp.asarray([3]), jnp.int32(1))
    assert cache.length.tolist() == [5, 7, 5]
    np.testing.assert_allclose(model.logits(hidden), model(text[1:2])[:, 4:], rtol=1e-4, atol=1e-4)
    for row in (0, 2):
        for now, before in zip(cache.layers["layers"], kept.layers["layers"], strict=True):
            np.testing.assert_array_equal(now[:, row], before[:, row])


def test_a_full_row_takes_no_more_tokens(model):
    _, cache = model.step(tokens(2, 4), empty_cache(CONFIG, 2, 6, jnp.float32))
    _, after = model.step(tokens(2, 1), cache._replace(length=jnp.asarray([4, 6])))
    for now, before in zip(after.layers["layers"], cache.layers["layers"], strict=True):
        np.testing.assert_array_equal(now[:, 1], before[:, 1])
    assert float(jnp.abs(after.layers["layers"].k[:, 0, :, 4]).max()) > 0


@pytest.mark.parametrize(
    "options", [dict(remat="full"), dict(remat="dots"), dict(remat="offload"), dict(remat="full", mlp_chunk=6)], ids=str
)
def test_what_saves_memory_changes_no_gradient(model, options):
    adapted = nnx.clone(model)
    add_adapters(adapted, LoraSection(rank=4), jax.random.key(0))
    graphdef, adapters, base = nnx.split(adapted, TRAINABLE, ...)
    adapters = jax.tree.map(lambda a: a + 0.01, adapters)
    text = tokens(2, 16)

    def loss(adapters, **options):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, adapters, base).hidden(text, **options)))

    plain = jax.jit(jax.grad(loss))(adapters)
    saved = jax.jit(jax.grad(functools.partial(loss, pieces=Pieces(**options))))(adapters)

    def check(a, b):
        # What is small beside its neighbours is a difference of large numbers, whose last bits are the machine's.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6 * max(1, np.abs(a).max()))

    jax.tree.map(check, plain, saved)


def test_an_mlp_sees_a_chunk_at_a_time():
    """A length that is no multiple of the chunk; the key differs from chunk to chunk; the order stays."""
    widths = []

    def function(x, key):
        widths.append(x.shape)
        return x + jax.random.uniform(key, ())

    x = jnp.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    assert len(np.unique(in_chunks(function, jnp.zeros_like(x), jax.random.key(0), 4))) == 3
    assert set(widths) == {(2, 4, 3)}
    np.testing.assert_array_equal(in_chunks(lambda x, _: 2 * x, x, None, 4), 2 * x)


def test_offloaded_layer_inputs_go_to_the_host(model):
    adapted = nnx.clone(model)
    add_adapters(adapted, LoraSection(rank=4), jax.random.key(0))
    graphdef, adapters, base = nnx.split(adapted, TRAINABLE, ...)

    def program(remat):
        def loss(adapters):
            return nnx.merge(graphdef, adapters, base).hidden(tokens(1, 16), pieces=Pieces(remat=remat)).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(adapters))

    layers, host = CONFIG.num_layers, "f32<host>[{},1,16,64]"
    assert host.format(layers) in program("offload")
    assert "<host>" not in program("full")


def test_strict_dtype_promotion(model):
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(lambda t: model(t))(tokens(1, 8))


def test_values_must_be_the_whole_table():
    with pytest.raises(ValueError, match=r"differing: \['norm.weight'\]"):
        Decoder(CONFIG, {path: jnp.zeros(1) for path in table(CONFIG) if path != "norm.weight"})


def test_a_config_is_checked():
    with pytest.raises(ValueError, match=r"num_attention_heads=4 must be a multiple of num_key_value_heads=3"):
        AttentionSpec(heads=4, kv_heads=3, head_dim=16)


def test_parameters_are_counted_once():
    tied = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    assert count_parameters(CONFIG) - count_parameters(tied) == 97 * 64
