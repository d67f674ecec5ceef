"""A tree taken apart by what is trained, and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import fill_frozen, join_tree, lora_init, lora_mask, make_optimizer, quantize_tree, split_tree


@pytest.fixture(params=[True, False], ids=["double", "single"])
def tree(request):
    """A packed kernel with an adapter, and a bias. Packed once, the tensor has None for what it does not use."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 96)), "bias": jnp.ones(96)}
    is_kernel = lambda path, leaf: path == "kernel"  # noqa: E731
    packed = quantize_tree(params, is_kernel, double=request.param)
    return lora_init(packed, is_kernel, jax.random.key(1), rank=4)


def paths(tree) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}


def test_each_leaf_is_in_one_of_the_two(tree):
    trained, frozen = split_tree(tree, lora_mask(tree))
    assert paths(trained) == {"kernel/A", "kernel/B"}
    assert paths(frozen) == paths(tree) - paths(trained)
    assert trained["kernel"].A is tree["kernel"].A  # nothing is copied


def test_joined_it_is_the_tree_with_the_new_values(tree):
    trained, frozen = split_tree(tree, lora_mask(tree))
    again = join_tree(jax.tree.map(lambda leaf: leaf + 1, trained), frozen)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    expected = jax.tree.map(lambda leaf, is_trained: leaf + 1 if is_trained else leaf, tree, lora_mask(tree))
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_it_is_what_the_masked_optimizer_does_to_the_whole_tree(tree):
    mask, tx = lora_mask(tree), optax.adamw(1e-2, weight_decay=0.1)
    trained, frozen = split_tree(tree, mask)
    grads = jax.tree.map(lambda leaf: leaf + 0.5, trained)
    updates, state = tx.update(grads, tx.init(trained), trained)
    ours = join_tree(optax.apply_updates(trained, updates), frozen)
    masked = make_optimizer(tx, mask)
    updates, _ = masked.update(fill_frozen(grads, tree), masked.init(tree), tree)
    jax.tree.map(np.testing.assert_array_equal, ours, optax.apply_updates(tree, updates))
    assert paths(optax.tree.get(state, "mu")) == {"kernel/A", "kernel/B"}


def test_a_mask_of_another_tree_is_refused(tree):
    with pytest.raises(ValueError, match=r"mask has 1 leaves in another structure.*lora_mask\(params\)"):
        split_tree(tree, {"kernel": True})
