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
from qlora_jax.models.blocks.attention import Context
from qlora_jax.models.blocks.block import BlockPart, NormPart, Part, below
from qlora_jax.models.blocks.linear import subkey
from qlora_jax.models.config import LayerKind, ModelConfig


def layer_parts(config: ModelConfig, kind: LayerKind) -> dict[str, Part]:
    """What a layer of this kind consists of, by names in checkpoints."""
    mixer, feed_forward = MIXERS[kind.mixer], FEED_FORWARDS[kind.feed_forward]
    norms = {name: NormPart(config.hidden_size, config.norm_eps) for name in config.norms if name}
    return {
        **norms,
        mixer.NAME: BlockPart(mixer, config),
        feed_forward.NAME: BlockPart(feed_forward, config),
    }


class Layer(nnx.Module):
    """x + mixer(x), then x + feed_forward(x), each between the norms that the family has before and after it.

    Built from `[L, …]` stacks; a scan hands it one layer's slice.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, values: Mapping[str, Any], variable: type[nnx.Variable]):
        self.norms, self.kind = config.norms, kind
        for name, part in layer_parts(config, kind).items():
            setattr(self, name, part.build(below(values, name), variable))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, window, cache=None, key=None, pieces: Pieces = FORWARD
    ):
        """Returns the new x and the mixer's cache with these tokens in it, None without one."""
        mixer = getattr(self, MIXERS[self.kind.mixer].NAME)
        with jax.named_scope("attention"):
            y = self._norm(self.norms.before_mixer, x)
            y, cache = mixer(y, context, window, cache, subkey(key, "attention"))
            x += self._norm(self.norms.after_mixer, y)
        with jax.named_scope("mlp"):
            return x + in_chunks(self._feed_forward, x, subkey(key, "mlp"), pieces.mlp_tokens(x.shape[1])), cache

    def _feed_forward(self, x: Float[Array, "B T D"], key) -> Float[Array, "B T D"]:
        block = getattr(self, FEED_FORWARDS[self.kind.feed_forward].NAME)
        return self._norm(self.norms.after_feed_forward, block(self._norm(self.norms.before_feed_forward, x), key))

    def _norm(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)


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
