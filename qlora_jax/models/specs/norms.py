"""Normalisations: their form, and where in a layer they stand."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """x / rms(x) · (offset + w).

    Attributes:
      wide: whether the weight multiplies in float32, before the cast to the dtype of x; else after it.
    """

    eps: float
    offset: float = 0.0
    wide: bool = False


class LayerNorms(NamedTuple):
    """The norms of a layer by their names in checkpoints; None where there is none."""

    before_mixer: str | None = "input_layernorm"
    after_mixer: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None


POST_NORMS = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH_NORMS = LayerNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
