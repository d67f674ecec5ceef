"""One layer of a decoder: a mixer of tokens and a feed-forward block, each with its norms and its shortcut."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.config.pieces import FORWARD, Pieces
from qlora_jax.models.blocks import FEED_FORWARDS, MIXERS
from qlora_jax.models.blocks.block import ArrayPart, BlockPart, NormPart, Part, below
from qlora_jax.models.blocks.context import Context, Own
from qlora_jax.models.blocks.linear import subkey
from qlora_jax.models.blocks.per_layer import layer_input_parts, layer_input_update
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import LayerKind


def layer_parts(config: ModelConfig, kind: LayerKind) -> dict[str, Part]:
    """What a layer of this kind consists of, by names in checkpoints."""
    mixer, feed_forward = MIXERS[type(kind.mixer)], FEED_FORWARDS[type(kind.feed_forward)]
    specs = config.norm, config.after_norm or config.norm
    norms = {name: NormPart(config.hidden_size, specs[i % 2]) for i, name in enumerate(kind.norms) if name}
    return {
        **norms,
        kind.mixer.name: BlockPart(mixer, kind.mixer, config),
        kind.feed_forward.name: BlockPart(feed_forward, kind.feed_forward, config),
        **(layer_input_parts(kind.per_layer, config) if kind.per_layer else {}),
        **({"layer_scalar": ArrayPart((1,), ("scalar",), 1.0)} if kind.scaled else {}),
    }


class Layer(nnx.Module):
    """x + mixer(x), then x + feed_forward(x), each between the norms that the family has before and after it.

    Built from `[L, …]` stacks; a scan hands it one layer's slice.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, values: Mapping[str, Any], variable: type[nnx.Variable]):
        self.kind, self.multiplier = kind, config.residual_multiplier
        for name, part in layer_parts(config, kind).items():
            setattr(self, name, part.build(below(values, name), variable))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, own: Own, rope, cache=None, pieces: Pieces = FORWARD
    ):
        """Returns the new x, the mixer's cache with these tokens in it, and the experts' balance; None without them."""
        norms, mixer = self.kind.norms, getattr(self, self.kind.mixer.name)
        with jax.named_scope("attention"):
            y, cache = mixer(self._norm(norms.before_mixer, x), context, own, rope, cache)
            x += self._scaled(self._norm(norms.after_mixer, y))
        balance = self._balance(x, context)
        with jax.named_scope("mlp"):
            key = subkey(own.key, "mlp")
            x += self._scaled(in_chunks(self._feed_forward, x, key, pieces.mlp_tokens(x.shape[1])))
        if own.extra is not None:
            x += layer_input_update(self, x, own.extra, own.key)
        scalar: nnx.Variable | None = getattr(self, "layer_scalar", None)
        return (x if scalar is None else x * scalar.get_value().astype(x.dtype)), cache, balance

    def _feed_forward(self, x: Float[Array, "B T D"], key) -> Float[Array, "B T D"]:
        block, norms = getattr(self, self.kind.feed_forward.name), self.kind.norms
        return self._norm(norms.after_feed_forward, block(self._norm(norms.before_feed_forward, x), key))

    def _balance(self, x: Float[Array, "B T D"], context: Context) -> Any:
        block = getattr(self, self.kind.feed_forward.name)
        if context.counted is None or not hasattr(block, "balance"):
            return None
        return block.balance(self._norm(self.kind.norms.before_feed_forward, x), context.counted)

    def _norm(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)

    def _scaled(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return y if self.multiplier == 1.0 else y * jnp.asarray(self.multiplier, y.dtype)


def in_chunks(function: Callable, x: Float[Array, "B T D"], key: Array | None, chunk: int) -> Float[Array, "B T D"]:
    """`function(x, key)`, which treats tokens one by one, on `chunk` tokens of each row at a time.

    In the backward pass, too, what it computes on the way exists for one chunk only.
    """
    batch, length, size = x.shape
    if length <= chunk:
        return function(x, key)
    padded = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, -1, chunk, size), 1, 0)
    keys = None if key is None else jax.random.split(key, len(chunks))
    y = lax.map(jax.checkpoint(lambda xs: function(*xs), prevent_cse=False), (chunks, keys))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, size)[:, :length]
