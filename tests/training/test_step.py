"""The train step as a pure function: what it changes, what it leaves alone, and what it equals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, OptimSection, Pieces, QuantSection
from qlora_jax.io.hf import random_model
from qlora_jax.lora.partition import fill_frozen, make_optimizer
from qlora_jax.lora.tree import lora_mask
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.objective import SFT
from qlora_jax.objective.sft import next_token_loss
from qlora_jax.quant.rules import AS_HELD, packed
from qlora_jax.training.optimizer import adamw, clip_by_norm, clipping, learning_rate
from qlora_jax.training.step import make_train_step, split_model
from tests import tiny_config

QLORA = packed(QuantSection())
CONFIG = tiny_config.windowed(0, 0)


def make_parts(dropout=0.0, rules=QLORA, kind=Frozen, layers=2, **adapters):  # noqa: B008 (frozen)
    config = tiny_config.windowed(*(0,) * layers)
    model = random_model(config, 0, dtype="float32", rules=rules, kind=kind).model
    if kind is Frozen:
        add_adapters(model, LoraSection(**{"rank": 4, "dropout": dropout, **adapters}), jax.random.key(1))
    return split_model(model)


def make_batch(accum=2, rows=2, length=24, seed=0):
    rng = np.random.default_rng(seed)
    shape = (accum, rows, length)
    # Rows score different numbers of tokens, as answers of different lengths do.
    scored = np.arange(length) > rng.integers(1, length - 2, (accum, rows, 1))
    tokens = jnp.asarray(rng.integers(0, 97, shape), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    segments = jnp.ones(shape, jnp.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "scored": jnp.asarray(scored)}


def train(parts, tx, batches, remat="full", key=None):
    """(adapters, opt_state, metrics) after a step on each batch."""
    step = make_train_step(parts.graphdef, tx, SFT(), Pieces(remat=remat, loss_chunk=16))
    adapters = jax.tree.map(jnp.copy, parts.trained)
    opt_state = tx.init(adapters)
    for index, batch in enumerate(batches):
        dropout = None if key is None else jax.random.fold_in(key, index)
        adapters, opt_state, metrics = step(adapters, opt_state, parts.base, batch, dropout)
    return adapters, opt_state, metrics


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_training_lowers_the_loss_and_leaves_every_byte_of_the_base():
    parts = make_parts()
    before = jax.tree.map(lambda a: np.array(a), parts.base)
    losses = []
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    step = make_train_step(parts.graphdef, optimizer, SFT(), Pieces(loss_chunk=16))
    adapters, state = parts.trained, optimizer.init(parts.trained)
    for _ in range(8):
        adapters, state, metrics = step(adapters, state, parts.base, make_batch(), None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    jax.tree.map(np.testing.assert_array_equal, before, parts.base)


def test_the_optimizers_state_is_no_larger_than_the_adapters_own():
    parts = make_parts()
    tx, whole = optax.adamw(1e-3), (parts.trained, parts.base)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(state))
        for state in (make_optimizer(tx, lora_mask(whole)).init(whole), tx.init(parts.trained))
    ]
    assert sizes[0] == sizes[1] > 2 * sum(leaf.size for leaf in jax.tree.leaves(parts.trained)) - 1


def test_the_mask_covers_the_whole_tree_by_kind():
    parts = make_parts()
    mask = lora_mask((parts.trained, parts.base))
    assert set(jax.tree.leaves(mask[0])) == {True}
    assert set(jax.tree.leaves(mask[1])) == {False}
    assert jax.tree.structure(mask) == jax.tree.structure((parts.trained, parts.base))


def test_a_caller_with_the_whole_tree_gets_the_same_update():
    """Frozen gradients of zeros or of garbage: the masked optimizer moves the adapters alike, and only them."""
    parts = make_parts()
    batch = make_batch(accum=1)
    tx = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-2, weight_decay=0.1))

    def loss(adapters):
        model = nnx.merge(parts.graphdef, adapters, parts.base)
        hidden = model.hidden(batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0])
        total, count = next_token_loss(hidden, batch["tokens"][0], batch["scored"][0], model.logits, chunk=16)
        return total / count

    grads = jax.jit(jax.grad(loss))(parts.trained)
    whole = (parts.trained, parts.base)
    zeros = fill_frozen((grads, jax.tree.map(lambda _: None, parts.base)), whole)
    garbage = (grads, jax.tree.map(jnp.ones_like, parts.base))
    ours, _, _ = train(parts, tx, [batch])
    for filled in (zeros, garbage):
        optimizer = make_optimizer(tx, lora_mask(whole))
        updates, _ = optimizer.update(filled, optimizer.init(whole), whole)
        moved = optax.apply_updates(whole, updates)
        assert_trees_close(moved[0], ours, rtol=1e-4, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, moved[1], parts.base)


def test_accumulating_equals_the_big_batch_for_uneven_token_counts():
    parts = make_parts()
    small = make_batch(accum=4, rows=2)
    assert len({int(n) for n in small["scored"].sum((1, 2))}) > 1
    big = jax.tree.map(lambda array: array.reshape(1, 8, -1), small)
    tx = optax.sgd(0.5)
    a, _, first = train(parts, tx, [small])
    b, _, second = train(parts, tx, [big])
    assert_trees_close(a, b, rtol=1e-5, atol=1e-6)
    for name in ("loss", "tokens", "grad_norm"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_rematerialization_policies_agree(remat):
    parts = make_parts(dropout=0.2)
    tx, key = optax.sgd(0.5), jax.random.key(3)
    assert_trees_close(
        train(parts, tx, [make_batch()], "full", key)[0],
        train(parts, tx, [make_batch()], remat, key)[0],
        rtol=1e-4,
        atol=1e-6,
    )


def test_dropout_is_drawn_from_the_key():
    parts, batches = make_parts(dropout=0.5), [make_batch()] * 2
    runs = [
        train(parts, optax.sgd(1.0), batches, key=key)[0]
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1))
    ]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    differs = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), runs[0], runs[2])
    assert any(jax.tree.leaves(differs))


def test_a_full_fine_tune_moves_every_weight():
    parts = make_parts(rules=AS_HELD, kind=nnx.Param)
    moved, _, _ = train(parts, optax.sgd(1.0), [make_batch()])
    unchanged = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), parts.trained, moved)
    assert not any(jax.tree.leaves(unchanged)) and not jax.tree.leaves(parts.base)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_loss_is_the_plain_one(chunk):
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.asarray(rng.standard_normal((2, 9, 8)), jnp.float32),
        jnp.asarray(rng.standard_normal((31, 8)), jnp.float32),
    )
    tokens, scored = (
        jnp.asarray(rng.integers(0, 31, (2, 9)), jnp.int32),
        jnp.asarray(rng.random((2, 9)) < 0.5),
    )

    def plain(hidden):
        scores = jax.nn.log_softmax(hidden[:, :-1] @ head.T)
        losses = -jnp.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(losses * scored[:, 1:])

    def chunked(hidden):
        return next_token_loss(hidden, tokens, scored, lambda h: h @ head.T, chunk=chunk)[0]

    np.testing.assert_allclose(chunked(hidden), plain(hidden), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(chunked)(hidden), jax.grad(plain)(hidden), rtol=1e-4, atol=1e-5)
    assert int(next_token_loss(hidden, tokens, scored, lambda h: h @ head.T, chunk=chunk)[1]) == int(
        scored[:, 1:].sum()
    )


def test_the_logits_of_the_whole_batch_never_exist():
    vocab, tokens = 4096, jnp.zeros((1, 2048), jnp.int32)
    head, hidden = jnp.zeros((vocab, 16)), jnp.zeros((1, 2048, 16))

    def loss(hidden):
        return next_token_loss(hidden, tokens, tokens == 0, lambda h: h @ head.T, chunk=64)[0]

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * 2048 * vocab * 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.5, 0.125]),
        ("cosine", [0.5, 1, 1, 0.5, 0.0381]),
    ],
)
def test_schedules(schedule, expected):
    rate = learning_rate(OptimSection(learning_rate=1.0, schedule=schedule, warmup_ratio=0.2), 10)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 6, 9)], expected, atol=1e-3)


def test_clipping_bounds_the_gradient_and_0_turns_it_off():
    grads = {"w": jnp.full((4,), 10.0)}
    sections = [OptimSection(clip=clip) for clip in (0.3, 0.0)]
    sizes = []
    for section in sections:
        # SGD instead of Adam shows the clipped gradient itself.
        clip = optax.chain(*clipping(section), optax.sgd(1.0))
        updates, _ = clip.update(grads, clip.init(grads), grads, norm=optax.tree.norm(grads))
        sizes.append(float(optax.tree.norm(updates)))
    np.testing.assert_allclose(sizes, [0.3, 20.0], rtol=1e-5)


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_clipping_by_a_given_norm_is_optax_own(size):
    grads = {"w": jnp.full((4,), size), "v": jnp.arange(3.0) * size}
    ours, theirs = clip_by_norm(0.3), optax.clip_by_global_norm(0.3)
    expected, _ = theirs.update(grads, theirs.init(grads))
    for name in grads:  # a part of the gradient is clipped as in the whole
        part = {name: grads[name]}
        clipped, _ = ours.update(part, ours.init(part), norm=optax.tree.norm(grads))
        np.testing.assert_array_equal(clipped[name], expected[name])


def test_adamw_is_optax_own():
    params, grads = {"w": jnp.arange(4.0)}, {"w": jnp.arange(4.0) / 100}
    section = OptimSection(learning_rate=1e-2, clip=0.0, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    ours, theirs = (
        adamw(section, optax.constant_schedule(1e-2)),
        optax.adamw(1e-2, 0.8, 0.9, 1e-6, weight_decay=0.1),
    )
    updates = [tx.update(grads, tx.init(params), params)[0]["w"] for tx in (ours, theirs)]
    np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["full", "adapter on the head"])
def test_slices_of_a_trained_head_change_no_step(trained, dtype):
    """Gradients of the output layer itself, and of an adapter on it, are those of the whole vocabulary at once."""
    full = trained == "full"
    rules, kind = (AS_HELD, nnx.Param) if full else (QLORA, Frozen)
    model = random_model(CONFIG, 0, dtype=dtype, rules=rules, kind=kind).model
    if not full:
        add_adapters(model, LoraSection(rank=4, targets=("q_proj", "lm_head")), jax.random.key(1))
    parts = split_model(model)
    optimizer = optax.sgd(0.5)

    def stepped(vocab_chunk):
        pieces = Pieces(loss_chunk=16, vocab_chunk=vocab_chunk)
        step = make_train_step(parts.graphdef, optimizer, SFT(), pieces)
        adapters = jax.tree.map(jnp.copy, parts.trained)
        return step(adapters, optimizer.init(adapters), parts.base, make_batch(), None)[0]

    rtol, atol = (1e-4, 1e-6) if dtype == "float32" else (0.02, 1e-3)
    wide = [jax.tree.map(lambda a: a.astype(jnp.float32), stepped(n)) for n in (0, 32)]
    assert_trees_close(*wide, rtol=rtol, atol=atol)
