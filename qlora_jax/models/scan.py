"""Running a segment's layers: one scan, whose body is the segment's unit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.config.pieces import Pieces
from qlora_jax.models.blocks.attention import Context
from qlora_jax.models.segments import Segment
from qlora_jax.quant.packed import stays_whole

LAYER_INPUT = "layer_input"
# What the backward pass finds stored instead of computing it again; each layer's input is always stored: on the device,
# or, by "offload", in the host's memory.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def run_segment(unit: "Unit", x: Any, caches: dict[str, Any] | None, keys: Any) -> tuple[Any, dict[str, Any] | None]:
    """x after all layers of the segment, and the caches of its stacks with these tokens in them.

    Args:
      keys: a dropout key for each layer of the decoder, or None.
    """
    body: Any = unit
    if unit.pieces.remat != "none":
        body = jax.checkpoint(unit, policy=REMAT_POLICIES[unit.pieces.remat], prevent_cse=False)
    own = None if caches is None else {stack.name: caches[stack.name] for stack in unit.segment}
    return lax.scan(body, (x, own), unit.over(keys))[0]


class Unit:
    """The layers of a segment's unit, as the body of its scan."""

    def __init__(self, model: Any, segment: Segment, context: Context, row, pieces: Pieces):
        self.segment, self.windows = segment, model.config.windows
        self.context, self.row, self.pieces = context, row, pieces
        split = [nnx.split(getattr(model, stack.name)) for stack in segment]
        self.graphdefs = [graphdef for graphdef, _ in split]
        self.states = [_sliced(state) for _, state in split]

    def over(self, keys):
        """What the scan runs over: of each stack its slices, its indices, windows and dropout keys."""
        return [
            (
                slices,
                jnp.arange(len(stack.layers), dtype=jnp.int32),
                jnp.asarray([self.windows[layer] for layer in stack.layers], jnp.int32),
                None if keys is None else keys[_taken(stack.layers)],
            )
            for stack, (slices, _) in zip(self.segment, self.states, strict=True)
        ]

    def __call__(self, carry, xs):
        x, caches = carry
        for stack, graphdef, (_, layer_at), own in zip(self.segment, self.graphdefs, self.states, xs, strict=True):
            sliced, index, window, key = own
            x = checkpoint_name(x, LAYER_INPUT)
            cache = None if caches is None else caches[stack.name].at_layer(index, self.row)
            layer = nnx.merge(graphdef, layer_at(sliced, index))
            x, cache = layer(x, self.context, window, cache, key, self.pieces)
            caches = None if cache is None else {**caches, stack.name: cache.whole}
        return (x, caches), None


def _taken(layers: range) -> slice:
    """The layers of a stack as a slice along an axis of all layers."""
    return slice(layers.start, layers.stop, layers.step)


def _sliced(state) -> tuple[list, Callable]:
    """(what a scan shall slice, a function of one slice and its index that gives the layer's state).

    A scan copies the slices of what it runs over. Weights in NF4, nearly all of a base, and adapters that are served
    side by side stay whole: a layer of theirs is read where it lies.
    """
    leaves, structure = jax.tree.flatten(state, is_leaf=stays_whole)

    def layer_at(slices: list, index):
        rest = iter(slices)
        values = [leaf.at_layer(index) if stays_whole(leaf) else next(rest) for leaf in leaves]
        return jax.tree.unflatten(structure, values)

    return [leaf for leaf in leaves if not stays_whole(leaf)], layer_at
