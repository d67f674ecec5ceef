"""What a family says of its blocks: the geometry and the options of norms, rotations, mixers and feed-forward blocks.

Every mixer and feed-forward block has one class here; `blocks/` has the module that computes it.
"""

from qlora_jax.models.specs.feed_forward import BesideSpec, MLPSpec, MoESpec, RouterSpec
from qlora_jax.models.specs.layers import FeedForwardSpec, LayerKind, LayerSpec, MixerSpec
from qlora_jax.models.specs.mixers import AttentionSpec, ConvSpec, DeltaSpec
from qlora_jax.models.specs.norms import POST_NORMS, SANDWICH_NORMS, LayerNorms, NormSpec
from qlora_jax.models.specs.rotation import Rope, RopeScaling

__all__ = [
    "POST_NORMS",
    "SANDWICH_NORMS",
    "AttentionSpec",
    "BesideSpec",
    "ConvSpec",
    "DeltaSpec",
    "FeedForwardSpec",
    "LayerKind",
    "LayerNorms",
    "LayerSpec",
    "MLPSpec",
    "MixerSpec",
    "MoESpec",
    "NormSpec",
    "Rope",
    "RopeScaling",
    "RouterSpec",
]
