"""Running a segment's layers: one scan, whose body is the segment's unit."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.config.pieces import Pieces
from qlora_jax.models.blocks.context import Context, Own
from qlora_jax.models.cache import source_of
from qlora_jax.models.segments import Segment, Stack
from qlora_jax.models.specs import Rope
from qlora_jax.quant.packed import stays_whole

LAYER_INPUT = "layer_input"
# What stands among the caches where the balance of experts is asked for: the sums of all layers.
BALANCE = "balance"
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


def run_segment(
    unit: "Unit", x: Any, caches: Mapping[str, Any], extra: Any, keys: Any
) -> tuple[Any, Mapping[str, Any]]:
    """x after all layers of the segment, and the caches with these tokens in them.

    Args:
      caches: by the names of stacks: of this segment's own, and of those that it borrows from; others are left alone.
      extra: inputs `[L, …]` of all the decoder's layers, or None.
      keys: a dropout key for each layer of the decoder, or None.
    """
    used = {name: caches[name] for name in unit.cached if name in caches}
    (x, used), _ = lax.scan(unit, (x, used), unit.over(extra, keys))
    return x, {**caches, **used}


class Unit:
    """The layers of a segment's unit, as the body of its scan."""

    def __init__(self, model: Any, segment: Segment, context: Context, pieces: Pieces):
        self.segment, self.config = segment, model.config
        self.context, self.pieces = context, pieces
        split = [nnx.split(getattr(model, stack.name)) for stack in segment]
        self.graphdefs = [graphdef for graphdef, _ in split]
        self.states = [_sliced(state) for _, state in split]
        self.sources = [source_of(model.config, stack) for stack in segment]
        self.ropes = [self._ropes(stack) for stack in segment]

    @property
    def cached(self) -> set[str]:
        """The stacks whose caches the unit reads or writes, and what the layers add up."""
        return {BALANCE, *(source.name for source in self.sources)}

    def over(self, extra, keys):
        """What the scan runs over: of each stack its slices, and what each layer has of its own."""
        return [
            (slices, self._own(stack, ropes, extra, keys))
            for stack, ropes, (slices, _) in zip(self.segment, self.ropes, self.states, strict=True)
        ]

    def __call__(self, carry, xs):
        x, caches = carry
        units = zip(self.segment, self.sources, self.ropes, self.graphdefs, self.states, xs, strict=True)
        for stack, source, ropes, graphdef, (_, layer_at), (slices, own) in units:
            cache = None
            if source.name in caches:
                # A layer that borrows reads the source's last layer.
                place = own.place if source == stack else jnp.int32(len(source.layers) - 1)
                cache = caches[source.name].at_layer(place, self.context.row)
            x, cache, balance = self._recomputed(graphdef, layer_at, ropes)(x, slices, own, cache)
            if balance is not None:
                caches = {**caches, BALANCE: jax.tree.map(jnp.add, caches[BALANCE], balance)}
            if cache is not None and source == stack:
                caches = {**caches, stack.name: cache.whole}
        return (x, caches), None

    def _recomputed(self, graphdef, layer_at: Callable, ropes: list[Rope]) -> Callable:
        """A layer as a function, which the backward pass computes again: one layer's activations exist at a time."""

        def run(x, slices, own: Own, cache):
            x = checkpoint_name(x, LAYER_INPUT)
            layer = nnx.merge(graphdef, layer_at(slices, own.place))
            return layer(x, self.context, own, self._rotation(ropes, own.rope), cache, self.pieces)

        if self.pieces.remat == "none":
            return run
        # Of several layers in the body, XLA would compute all again before the first is needed: barriers keep them in
        # turn. A body of one layer needs none.
        several = len(self.segment) > 1
        return jax.checkpoint(run, policy=REMAT_POLICIES[self.pieces.remat], prevent_cse=several)

    def _ropes(self, stack: Stack) -> list[Rope]:
        found = (self.config.layers[layer].rope for layer in stack.layers)
        return list(dict.fromkeys(rope for rope in found if rope is not None))

    def _own(self, stack: Stack, ropes: list[Rope], extra, keys) -> Own:
        layers = [self.config.layers[layer] for layer in stack.layers]
        which = [ropes.index(layer.rope) if layer.rope else 0 for layer in layers]
        place = slice(stack.layers.start, stack.layers.stop, stack.layers.step)
        return Own(
            place=jnp.arange(len(layers), dtype=jnp.int32),
            window=jnp.asarray([layer.window for layer in layers], jnp.int32),
            rope=jnp.asarray(which, jnp.int32),
            extra=None if extra is None else extra[place],
            key=None if keys is None else keys[place],
        )

    def _rotation(self, ropes: list[Rope], which):
        """cos and sin of the layer's rotation, and whether it rotates pairs; None where it has none."""
        if not ropes:
            return None
        tables = [self.context.ropes[rope] for rope in ropes]
        cos, sin = tables[0] if len(tables) == 1 else (jnp.stack(both)[which] for both in zip(*tables, strict=True))
        return cos, sin, ropes[0].pairs


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
