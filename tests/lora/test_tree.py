"""QLoRA on a tree that is not ours: a two-layer network with Flax-shaped kernels [in, out]."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import fill_frozen, lora_dot, lora_init, lora_mask, make_optimizer, merge_tree, quantize_tree
from qlora_jax.lora.tree import LoraWeight
from qlora_jax.quant.nf4 import NF4Tensor


def is_kernel(path, leaf):
    return path.endswith("kernel")


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "dense1": {"kernel": jax.random.normal(keys[0], (64, 96)) * 0.1, "bias": jnp.ones(96)},
        "dense2": {"kernel": jax.random.normal(keys[1], (96, 8)) * 0.1, "bias": jnp.ones(8)},
    }


def forward(params, x):
    for layer in ("dense1", "dense2"):
        x = jnp.tanh(lora_dot(x, params[layer]["kernel"]) + params[layer]["bias"])
    return x


def test_the_whole_way(params):
    x, y = jax.random.normal(jax.random.key(1), (32, 64)), jnp.linspace(-0.5, 0.5, 32)[:, None] * jnp.ones(8)
    packed = quantize_tree(params, is_kernel)
    assert isinstance(packed["dense1"]["kernel"], NF4Tensor) and packed["dense1"]["kernel"].shape == (96, 64)
    tree = lora_init(packed, is_kernel, jax.random.key(2), rank=4, alpha=8)
    np.testing.assert_allclose(forward(tree, x), forward(packed, x))  # B is zero
    mask = lora_mask(tree)
    assert sum(jax.tree.leaves(mask)) == 4
    optimizer = make_optimizer(optax.adam(1e-2), mask)

    @jax.jit
    def step(tree, state):
        def loss(trained):
            return jnp.mean((forward(combine(trained, tree, mask), x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(jax.tree.map(lambda m, p: p if m else None, mask, tree))
        updates, state = optimizer.update(fill_frozen(grads, tree), state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, losses, start = optimizer.init(tree), [], tree
    for _ in range(60):
        tree, state, value = step(tree, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 3
    base = lambda t: [t["dense1"]["kernel"].base, t["dense1"]["bias"], t["dense2"]["bias"]]  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, base(tree), base(start))
    merged = merge_tree(tree)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(forward(merged, x), forward(tree, x), rtol=1e-4, atol=1e-5)


def combine(trained, tree, mask):
    return jax.tree.map(lambda m, t, p: t if m else p, mask, trained, tree, is_leaf=lambda node: node is None)


def test_the_mask_is_the_whole_tree(params):
    tree = lora_init(params, lambda path, _: path == "dense2/kernel", jax.random.key(0), rank=2)
    assert lora_mask(tree) == {
        "dense1": {"kernel": False, "bias": False},
        "dense2": {"kernel": LoraWeight(False, True, True, 8.0), "bias": False},
    }


def test_adapters_of_an_unquantized_weight(params):
    tree = lora_init(params, is_kernel, jax.random.key(0), rank=2)
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(forward(tree, x), forward(params, x))
    jax.tree.map(np.testing.assert_array_equal, merge_tree(tree), params)


@pytest.mark.parametrize("function", [quantize_tree, lambda p, f: lora_init(p, f, jax.random.key(0))])
def test_choosing_nothing_or_no_matrix(params, function):
    with pytest.raises(ValueError, match="chose none of dense1/bias, dense1/kernel, dense2/bias, dense2/kernel"):
        function(params, lambda path, leaf: "attention" in path)
    with pytest.raises(ValueError, match=r"dense1/bias has shape \(96,\): only a matrix"):
        function(params, lambda path, leaf: True)
