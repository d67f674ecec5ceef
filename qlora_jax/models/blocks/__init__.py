"""The blocks that a decoder's layers are made of, by the classes that say what a family wants of them."""

from typing import Any

from qlora_jax.models.blocks.attention import Attention
from qlora_jax.models.blocks.delta import GatedDelta
from qlora_jax.models.blocks.mlp import MLP
from qlora_jax.models.blocks.moe import Beside, MoE
from qlora_jax.models.blocks.short_conv import ShortConv
from qlora_jax.models.specs import AttentionSpec, BesideSpec, ConvSpec, DeltaSpec, MLPSpec, MoESpec

# A mixer lets tokens see each other, and has a kind of cache; a feed-forward block treats them one by one.
MIXERS: dict[type, Any] = {AttentionSpec: Attention, DeltaSpec: GatedDelta, ConvSpec: ShortConv}
FEED_FORWARDS: dict[type, Any] = {MLPSpec: MLP, MoESpec: MoE, BesideSpec: Beside}
