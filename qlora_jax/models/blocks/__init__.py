"""The blocks that a decoder's layers are made of, by the names that configurations call them."""

from qlora_jax.models.blocks.attention import Attention
from qlora_jax.models.blocks.mlp import MLP

# A mixer lets tokens see each other, and has a kind of cache; a feed-forward block treats them one by one.
MIXERS = {"attention": Attention}
FEED_FORWARDS = {"mlp": MLP}
