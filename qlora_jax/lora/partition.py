"""The trained and the frozen leaves of one tree: apart, together again, or under one optimizer that knows both."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def split_tree(params: Any, mask: Any) -> tuple[Any, Any]:
    """(trained, frozen): the tree twice, with None in place of each other's leaves, by a mask as `lora_mask` gives it.

    None is no leaf to JAX: gradients and an optimizer's state of `trained` exist for its own leaves alone.

    Raises:
      ValueError: the mask has another structure than the tree.
    """
    expected: Any = jax.tree.structure(params)
    found: Any = jax.tree.structure(mask)
    if found != expected:
        raise ValueError(
            f"split_tree: the mask has {found.num_leaves} leaves in another structure than the tree, which has "
            f"{expected.num_leaves}: make it of this tree, with lora_mask(params)"
        )

    def chosen(kind: bool) -> Any:
        return jax.tree.map(lambda leaf, is_trained: leaf if is_trained == kind else None, params, mask)

    return chosen(True), chosen(False)


def join_tree(trained: Any, frozen: Any) -> Any:
    """The tree that `split_tree` took apart; `trained` may have other values by now."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda node: node is None)


def make_optimizer(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformationExtraArgs:
    """`tx` where `mask` (see `lora_mask`) is True; no state and a zero update where it is False.

    `optax.masked` alone would hand the frozen leaves' gradients through as their updates.
    """
    return optax.partition({True: tx, False: optax.set_to_zero()}, mask)


def fill_frozen(grads: Any, params: Any) -> Any:
    """Gradients over the whole tree: `grads` where it has them, zeros of the leaf's dtype where it has None."""

    def fill(p, g):
        # A packed weight has None for what it does not use: that is no leaf, and stays.
        return jnp.zeros_like(p) if g is None and p is not None else g

    return jax.tree.map(fill, params, grads, is_leaf=lambda node: node is None)
