"""A decoder small enough for every test: grouped queries, and a sliding window in one layer."""

import dataclasses

from qlora_jax.models import ModelConfig
from qlora_jax.models.specs import AttentionSpec, ConvSpec, DeltaSpec, LayerKind, LayerSpec, MLPSpec, NormSpec, Rope

MIXER = AttentionSpec(heads=4, kv_heads=2, head_dim=16)
KIND = LayerKind(MIXER, MLPSpec(inner=128))
ROPE = Rope(theta=10000.0, dims=16)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    layers=tuple(LayerSpec(KIND, window, ROPE) for window in (0, 6, 0)),
    norm=NormSpec(eps=1e-5),
    max_position=256,
)


def windowed(*windows: int) -> ModelConfig:
    """The same with as many layers as there are windows."""
    return dataclasses.replace(CONFIG, layers=tuple(LayerSpec(KIND, window, ROPE) for window in windows))


# A decoder of every kind of mixer: two units of four layers.
DELTA = DeltaSpec(key_heads=2, value_heads=4, key_dim=8, value_dim=12, kernel=4, norm=NormSpec(eps=1e-5))
CONVOLUTION = ConvSpec(width=64, kernel=3, bias=True)
HYBRID = dataclasses.replace(
    CONFIG,
    layers=tuple(
        LayerSpec(LayerKind(mixer, MLPSpec(inner=128)), rope=ROPE if mixer is MIXER else None)
        for mixer in (DELTA, CONVOLUTION, DELTA, MIXER) * 2
    ),
)
