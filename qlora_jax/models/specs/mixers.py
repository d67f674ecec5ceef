"""Blocks that let tokens see each other."""

import dataclasses
from typing import Literal

from qlora_jax.models.specs.norms import NormSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention with grouped queries.

    Attributes:
      heads, kv_heads, head_dim: of queries; of keys and values; elements of each.
      scale: factor of q · k; 1/√head_dim where None.
      qkv_bias, output_bias: which projections have biases.
      fused: whether one `qkv_proj` gives queries, keys and values, one after the other.
      output: the last projection's name.
      qk_norm: None; "head", each head with weights; "whole", all heads as one vector; "scaleless", each head without.
      norm: of queries, keys and values.
      norm_names: of the norms of queries and keys.
      rotated_first: whether queries and keys are rotated before they are normalised.
      value_norm: whether values are normalised, without weights.
      clip: how large queries, keys and values may be after norms of all heads as one vector; 0 for any.
      soft_cap: scores become `cap · tanh(score / cap)`; 0 for none.
      sinks: whether each head has a learned score that takes part in the softmax, and gives nothing.
      gate: "interleaved": q_proj gives for each head queries, then gates; else the name of the projection that gives
        gates, or nothing. The output is multiplied by sigmoid(gates).
      temperature: (β, n): queries at position p are multiplied by 1 + β · log(1 + ⌊p / n⌋).
      keys_are_values: whether there is no v_proj: values are the keys before norm and rotation.
      borrows: whether the layer has no keys and values of its own; see LayerSpec.source.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    fused: bool = False
    output: str = "o_proj"
    qk_norm: Literal["head", "whole", "scaleless"] | None = None
    norm: NormSpec | None = None
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    rotated_first: bool = False
    value_norm: bool = False
    clip: float = 0.0
    soft_cap: float = 0.0
    sinks: bool = False
    gate: str = ""
    temperature: tuple[float, int] | None = None
    keys_are_values: bool = False
    borrows: bool = False
    name: str = "self_attn"

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of a token's queries, and of its keys."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.heads} must be a multiple of num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """Gated DeltaNet (arXiv 2412.06464): a state that maps keys to values, instead of a look at all tokens.

    Attributes:
      key_heads, value_heads: each key head serves value_heads / key_heads value heads that follow one another.
      key_dim, value_dim: elements of a head's key and value.
      kernel: tokens that the convolution over queries, keys and values sees.
      norm: of each head's output.
      activation: after the convolution, a name in blocks.activations.ACTIVATIONS.
      fused: whether in_proj_qkvz and in_proj_ba give all, interleaved by key heads; else there are four projections.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: NormSpec
    activation: str = "silu"
    fused: bool = False
    name: str = "linear_attn"

    @property
    def keys(self) -> int:
        """Elements of a token's keys, and of its queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Elements of a token's values."""
        return self.value_heads * self.value_dim

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of a token's values, and of its keys."""
        return self.values, self.keys

    def __post_init__(self):
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"linear_num_value_heads={self.value_heads} must be a multiple of linear_num_key_heads={self.key_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """A short convolution between two gates.

    Attributes:
      width: elements of a token.
      kernel: tokens that the convolution sees.
      bias: whether the projections and the convolution have biases.
    """

    width: int
    kernel: int
    bias: bool = False
    name: str = "conv"

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of what a token gives to the convolution, and of each of its gates."""
        return self.width, self.width
