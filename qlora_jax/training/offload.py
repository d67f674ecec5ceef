"""The optimizer's state in host memory, brought to the device a page at a time ("paged", arXiv 2305.14314).

A page is a decoder layer, or all that lies outside the stack of layers. Its tree is that of all that is trained, with
MaskedNode, Optax' mark for "not here", at the leaves of other pages; so the same optimizer updates a page as it is.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from qlora_jax.models.segments import in_stack
from qlora_jax.training.gradients import Gradients

NOTHING = optax.MaskedNode()
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class HostState(NamedTuple):
    """An optimizer's state in pages. Moments lie in host memory, counters on the device.

    Attributes:
      layers: the state of each decoder layer.
      rest: the state of what is trained outside the layers; None where nothing is.
    """

    layers: list[Any]
    rest: Any


def init_state(optimizer: optax.GradientTransformation, trained: Any) -> HostState:
    """`optimizer.init(trained)` in pages, each made by itself.

    Raises:
      NotImplementedError: the device cannot reach host memory.
    """
    device = jax.local_devices()[0]
    if "pinned_host" not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise NotImplementedError(
            f"optim.offload=host needs memory of the kind pinned_host, but {device.device_kind} has only "
            f"{', '.join(kinds)}: set optim.offload=none"
        )
    init = jax.jit(lambda trained, index: _move(optimizer.init(page(trained, index)), HOST))
    layers = [init(trained, index) for index in range(_layer_count(trained))]
    return HostState(layers, init(trained, None) if _has_rest(trained) else None)


def make_page_update(optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted `update(trained, state, found, index) -> (trained, state)` of a page; both are donated.

    Args:
      optimizer: treats every element by itself, given the norm of the whole gradient.

    The update's own arguments: `trained` whole, `state` of the page in host memory, `found` the Gradients of a batch,
    `index` int32 of the layer, or None for what lies outside the layers.
    """
    step = optax.with_extra_args_support(optimizer).update

    def update(trained, state, found: Gradients, index):
        params = page(trained, index)
        gradient = found._replace(sums=page(found.sums, index)).mean(like=params)
        updates, state = step(gradient, _move(state, DEVICE), params, norm=found.metrics["grad_norm"])
        return _written(trained, optax.apply_updates(params, updates), index), _move(state, HOST)

    return jax.jit(update, donate_argnums=(0, 1))


def page(tree: Any, index: Any) -> Any:
    """The leaves of layer `index`, or (None) those outside the layers, NOTHING elsewhere; counters in every page."""

    def choose(path, leaf):
        if leaf.ndim == 0:
            return leaf
        if _in_stack(path):
            return NOTHING if index is None else leaf[index]
        return leaf if index is None else NOTHING

    return jax.tree.map_with_path(choose, tree)


def whole_state(state: Any) -> Any:
    """A HostState as the state of the optimizer without pages, in NumPy arrays; any other state as it is."""
    if not isinstance(state, HostState):
        return state
    # Copies: the arrays are donated to the next step, perhaps before they are all on disk.
    parts = [] if state.rest is None else [jax.tree.map(np.array, state.rest)]
    if state.layers:
        join = lambda *leaves: np.stack(leaves) if leaves[0].ndim else np.array(leaves[0])  # noqa: E731
        parts.append(jax.tree.map(join, *state.layers))
    return functools.reduce(_joined, parts)


def paged_like(state: Any, whole: Any) -> Any:
    """The state of an optimizer in the form of `state`: in pages, and in host memory, where that is a HostState."""
    if not isinstance(state, HostState):
        return whole
    # Every page owns its counters, because each update donates its page.
    put = lambda like, leaf: jax.device_put(leaf, like.sharding, may_alias=False)  # noqa: E731
    layers = [jax.tree.map(put, layer, page(whole, index)) for index, layer in enumerate(state.layers)]
    return HostState(layers, None if state.rest is None else jax.tree.map(put, state.rest, page(whole, None)))


def _move(tree: Any, space: Any) -> Any:
    """Inside jit: the tree with all but its counters in a memory space."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree)


def _in_stack(path: tuple) -> bool:
    return any(isinstance(name := getattr(entry, "key", None), str) and in_stack(name) for entry in path)


def _layer_count(trained: Any) -> int:
    return next((leaf.shape[0] for path, leaf in jax.tree.leaves_with_path(trained) if _in_stack(path)), 0)


def _has_rest(trained: Any) -> bool:
    return any(not _in_stack(path) for path, _ in jax.tree.leaves_with_path(trained))


def _written(tree: Any, page: Any, index: Any) -> Any:
    """The tree with a page's leaves in their places."""

    def write(leaf, new):
        if isinstance(new, optax.MaskedNode):
            return leaf
        return new if index is None else leaf.at[index].set(new)

    return jax.tree.map(write, tree, page)


def _joined(a: Any, b: Any) -> Any:
    """Two trees of which each has NOTHING where the other has a leaf."""
    is_nothing = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x, y: y if is_nothing(x) else x, a, b, is_leaf=is_nothing)
