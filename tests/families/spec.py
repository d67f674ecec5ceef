"""What a test's checkpoint is made from: a transformers configuration as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The demo's tokenizer without its later merges.
VOCABULARY = 512
HIDDEN = 64
# Every linear layer's input is a multiple of 64: bitsandbytes' CPU dequantization is wrong for other multiples of 16.
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.08,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Windows are shorter than the shortest document that the tests use.
WINDOW = 8
# Positions from here on are long for YaRN.
ORIGINAL_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Family:
    """One checkpoint.

    Attributes:
      config: name of the transformers configuration class.
      text: `model_type` of the model, or of its text part.
      options: the configuration's arguments.
      model: name of the model class; transformers' choice for causal language models where None.
    """

    config: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


def sizes(**changes) -> dict[str, Any]:
    """The arguments that all text configurations share, and a family's own."""
    return {**COMMON, **changes}


def rope(theta: float = 10000.0, **more) -> dict[str, Any]:
    """Plain rotary embeddings."""
    return dict(rope_type="default", rope_theta=theta, **more)


def yarn(**more) -> dict[str, Any]:
    """Rotary embeddings stretched by YaRN, for texts longer than those of pretraining.

    With the usual betas, 32 and 1, no frequency of such a short text would lie between them.
    """
    stretched = dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=8.0,
        original_max_position_embeddings=ORIGINAL_LENGTH,
        beta_fast=0.5,
        beta_slow=0.02,
    )
    return {**stretched, **more}
