"""The loss over slices of the vocabulary is the direct formula, whatever the head is and whatever of it is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, Pieces, VocabSlices
from qlora_jax.models import Decoder
from qlora_jax.models import table as table_of
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.objective.sft import next_token_loss
from qlora_jax.quant import int8, nf4
from tests import tiny_config

VOCAB = 300
CONFIG = dataclasses.replace(tiny_config.windowed(0), vocab_size=VOCAB)
STORAGES = {
    "none": (lambda table: table, lambda table: table),
    "nf4": (nf4.quantize, nf4.dequantize),
    "int8": (int8.quantize, int8.Int8Tensor.dequantize),
}


def vocab_slices(chunk, vocab):
    return Pieces(vocab_chunk=chunk).vocab_slices(vocab)


def table(dtype):
    return jax.random.normal(jax.random.key(0), (VOCAB, 64), dtype)


def make_model(head, *, tied=False, kind=Frozen):
    """A decoder whose layers are zeros: only its head counts here."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    specs = table_of(config)
    values = {path: jnp.zeros((1, *spec.shape) if "layers" in path else spec.shape) for path, spec in specs.items()}
    return Decoder(config, values | {"embed_tokens.weight" if tied else "lm_head.weight": head}, kind)


def data(dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 13, 64)), dtype)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 13)), jnp.int32).at[0, 1:5].set(jnp.array([0, 127, 128, 299]))
    return hidden, tokens, jnp.asarray(rng.random((2, 13)) < 0.7).at[0, 1:5].set(True)


def direct(weight, hidden, tokens, scored):
    scores = jnp.einsum("btd,vd->btv", hidden[:, :-1], weight.astype(hidden.dtype)).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1)[..., 0]
    return jnp.sum(losses * scored[:, 1:])


def sliced(model, hidden, tokens, scored, *, chunk=8, size=128):
    slices = vocab_slices(size, VOCAB)
    return next_token_loss(hidden, tokens, scored, model.logits, chunk=chunk, slices=slices)[0]


def test_slices_cover_the_vocabulary():
    assert vocab_slices(0, VOCAB) is vocab_slices(300, VOCAB) is vocab_slices(299, 130) is None
    assert vocab_slices(128, VOCAB) == VocabSlices(count=3, size=128, vocab=300)
    assert vocab_slices(4096, 32_000) == VocabSlices(count=8, size=4096, vocab=32_000)
    assert vocab_slices(16_384, 128_256) == VocabSlices(count=8, size=16_128, vocab=128_256)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_frozen_head(storage, dtype, tied):
    store, restore = STORAGES[storage]
    head = store(table(dtype))
    model = make_model(head, tied=tied)
    hidden, *rest = data(dtype)
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda h, loss=loss: loss(h, *rest)))(hidden)
        for loss in (functools.partial(sliced, model), functools.partial(direct, restore(head)))
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
    # A slice's share of the derivative is rounded to the dtype of the hidden states, and then added in float32.
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=0, atol=0.03)
    np.testing.assert_allclose(*(np.asarray(g[1], np.float32) for g in (ours, theirs)), **tolerance)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_itself(tied):
    head = table("float32")
    graphdef, weights = nnx.split(make_model(head, tied=tied, kind=nnx.Param))
    rest = data("float32")
    grads = jax.jit(jax.grad(lambda w: sliced(nnx.merge(graphdef, w), *rest)))(weights)
    owner = grads["embed_tokens" if tied else "lm_head"]["weight"].get_value()
    np.testing.assert_allclose(owner, jax.grad(direct)(head, *rest), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_head_with_an_adapter(storage):
    store, restore = STORAGES[storage]
    head = store(table("float32"))
    model = make_model(head)
    add_adapters(model, LoraSection(rank=3, alpha=6.0, targets=("lm_head",)), jax.random.key(1))
    graphdef, adapters, base = nnx.split(model, nnx.Param, ...)
    A = adapters["lm_head"]["lora"]["A"].get_value()
    B = jax.random.normal(jax.random.key(2), (VOCAB, 3)) / 10
    adapters["lm_head"]["lora"]["B"].set_value(B)
    rest = data("float32")
    ours = jax.jit(jax.grad(lambda a: sliced(nnx.merge(graphdef, a, base), *rest)))(adapters)["lm_head"]["lora"]
    theirs = jax.grad(lambda A, B: direct(restore(head) + 2 * B @ A, *rest), (0, 1))(A, B)
    for matrix, want in zip("AB", theirs, strict=True):
        np.testing.assert_allclose(ours[matrix].get_value(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_slices_and_chunks_of_any_size(chunk):
    head = table("float32")
    rest = data("float32")
    for size in (128, 256, 0):
        got = sliced(make_model(head), *rest, chunk=chunk, size=size)
        np.testing.assert_allclose(got, direct(head, *rest), rtol=2e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
    head = table("float32") * 200
    rest = data("float32")
    got, grads = jax.value_and_grad(functools.partial(sliced, make_model(head)))(*rest)
    np.testing.assert_allclose(got, direct(head, *rest), rtol=2e-6)
    np.testing.assert_allclose(grads, jax.grad(direct, 1)(head, *rest), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_neither_all_logits_nor_the_whole_head_ever_exist(storage):
    vocab, width, tokens = 16_384, 128, jnp.zeros((1, 513), jnp.int32)
    shape = jax.eval_shape(STORAGES[storage][0], jax.ShapeDtypeStruct((vocab, width), jnp.float32))

    def loss(hidden, head):
        whole = make_model(head)
        return next_token_loss(hidden, tokens, tokens == 0, whole.logits, chunk=64, slices=vocab_slices(1024, vocab))[0]

    hidden = jax.ShapeDtypeStruct((1, 513, width), jnp.float32)
    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden, shape).compile().memory_analysis()
    # Of a chunk of 64 and a slice of 1,024: scores 0.26 MB, rows 0.52 MB. All scores of a chunk: 4 MB; the head: 8 MB.
    assert memory.temp_size_in_bytes < 4e6
