"""The optimizer's state in host memory: the same numbers, a page at a time, and checkpoints that look the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import OptimSection, Pieces
from qlora_jax.device.facts import ProgramMemory
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.objective import SFT
from qlora_jax.quant.rules import AS_HELD
from qlora_jax.training import offload as pages
from qlora_jax.training.gradients import Gradients
from qlora_jax.training.offload import HostState, init_state, make_page_update, paged_like, whole_state
from qlora_jax.training.offload_step import make_paged_step
from qlora_jax.training.optimizer import adamw, learning_rate
from tests.training.test_step import make_batch, make_parts, train

# The norm of these gradients is 0.9 to 2.1, so that they are clipped.
SECTION = OptimSection(learning_rate=1e-2, weight_decay=0.1, clip=0.3, schedule="linear")
BATCHES = [make_batch(seed=seed) for seed in range(3)]
ADAPTERS: dict = {}
FULL, HEAD = {"rules": AS_HELD, "kind": nnx.Param}, {"targets": ("lm_head", "q_proj")}


def make_tx(moments="fp32"):
    """AdamW with clipping, decay and a schedule."""
    section = dataclasses.replace(SECTION, moments=moments)
    return adamw(section, learning_rate(section, 4))


def make_step(parts, moments="fp32"):
    """(the step, the starting state)."""
    optimizer = make_tx(moments)
    step = make_paged_step(parts.graphdef, optimizer, SFT(), Pieces(loss_chunk=16))
    return step, init_state(optimizer, parts.trained)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def check(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(check, a, b)


def kinds(state) -> set[str]:
    """Where the arrays of a state lie, but for its counters."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}


@functools.cache
def prepared(**model):
    """(parts, the compiled step, the starting state)."""
    parts = make_parts(**model)
    step, state = make_step(parts)
    return parts, step.lower(parts.trained, state, parts.base, BATCHES[0], None).compile(), state


@pytest.mark.parametrize("model", [ADAPTERS, FULL, HEAD], ids=["adapters", "full", "head"])
def test_pages_train_to_the_same_bits(model):
    parts, step, state = prepared(**model)
    expected = train(parts, make_tx(), BATCHES)
    adapters, state = jax.tree.map(jnp.copy, (parts.trained, state))  # they are donated
    for batch in BATCHES:
        adapters, state, metrics = step(adapters, state, parts.base, batch, None)
    assert float(metrics["grad_norm"]) > SECTION.clip
    assert_same((adapters, whole_state(state), metrics), expected)
    assert kinds(state) == {"pinned_host"}
    assert (len(state.layers), state.rest is None) == (2, model is ADAPTERS)


def test_narrow_moments_and_gradients_are_paged_too():
    """Not to the same bits: XLA may leave out a rounding to bfloat16 between two operations, in one program only."""
    parts = make_parts()
    optimizer = make_tx("bf16")
    update = make_page_update(optimizer)

    @jax.jit
    def update_whole(adapters, state, found):
        gradient, norm = found.mean(like=adapters), found.metrics["grad_norm"]
        updates, state = optimizer.update(gradient, state, adapters, norm=norm)
        return optax.apply_updates(adapters, updates), state

    expected, whole = parts.trained, optimizer.init(parts.trained)
    adapters, state = jax.tree.map(jnp.copy, expected), init_state(optimizer, parts.trained)
    for found in map(random_gradients, (parts.trained,) * 3, range(3)):
        expected, whole = update_whole(expected, whole, found)
        for index, layer in enumerate(state.layers):
            adapters, state.layers[index] = update(adapters, layer, found, np.int32(index))
    # Each of the three steps moves an element by up to 1e-2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), adapters, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state.layers[0], "mu"))} == {jnp.dtype(jnp.bfloat16)}


def random_gradients(adapters, seed) -> Gradients:
    rng = np.random.default_rng(seed)
    sums = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.bfloat16), adapters)
    return Gradients(sums, jnp.float32(7), {"grad_norm": optax.tree.norm(sums) / 7})


def test_a_page_is_one_layer_and_frozen_leaves_have_no_state():
    parts = make_parts()
    _, state = make_step(parts, "bf16")
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(layer)) for layer in state.layers]
    # Two moments of half the adapters each, and the counters of Adam and of the schedule.
    count = sum(leaf.size for leaf in jax.tree.leaves(parts.trained))
    assert sizes == [count + 2] * 2
    assert kinds(state) == {"pinned_host"}
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state.layers[0], "mu"))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_the_stated_memory_is_that_of_the_largest_program_beside_the_base():
    parts, compiled, _ = prepared(**ADAPTERS)
    assert compiled.resident == sum(leaf.nbytes for leaf in jax.tree.leaves(parts.base))
    programs = [ProgramMemory.of(compiled.gradients), ProgramMemory.of(compiled.update, compiled.resident)]
    assert programs[0].peak > programs[1].peak  # of a model this small
    assert compiled.memory_analysis() == programs[0]
    larger = dataclasses.replace(compiled, resident=10**9).memory_analysis()
    assert larger.peak == programs[1].peak - compiled.resident + 10**9


@pytest.mark.parametrize("before", ["pages", "whole"])
def test_a_checkpoint_looks_the_same_with_and_without_pages(tmp_path, before):
    """Either form of the state is restored to the last bit from what the other one saved."""
    parts = make_parts(**HEAD)
    _, state = make_step(parts, "bf16")
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), whole_state(state))
    forms = {"pages": paged_like(state, drawn), "whole": drawn}
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=False)
    checkpoints.save(1, parts.trained, whole_state(forms[before]), {})
    checkpoints.wait()
    restored = checkpoints.restore(1, optimizer=whole_state(state))["optimizer"]
    assert_same(restored, drawn)
    assert_same(paged_like(drawn, restored), drawn)
    again = paged_like(state, restored)
    assert_same(again, forms["pages"])
    assert isinstance(again, HostState) and kinds(again) == {"pinned_host"}
    checkpoints.close()


def test_a_device_without_host_memory_is_refused(monkeypatch):
    class Memory:
        kind = "device"

    class Device:
        device_kind = "toaster"

        def addressable_memories(self):
            return [Memory()]

    monkeypatch.setattr(pages.jax, "local_devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match="pinned_host, but toaster has only device: set optim.offload=none"):
        make_step(make_parts())
