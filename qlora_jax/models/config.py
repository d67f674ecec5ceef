"""The geometry of a decoder, whatever family its checkpoint belongs to."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; each kind reads some of the fields.

    Attributes:
      kind: "default", "linear", "dynamic", "yarn", "longrope" or "llama3".
      original_max_position: the longest text before stretching.
      attention_factor: what cosines and sines are multiplied by (yarn, longrope).
      beta_fast, beta_slow, truncate: between how many turns over the original length yarn blends, and whether at whole
        dimensions only.
      short_factors, long_factors: longrope's divisors `[head_dim / 2]` of the frequencies, for texts within the
        original length and beyond it.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")

    def longest(self, stated: int) -> int:
        """The longest text, of a configuration that states `stated` positions: some state those before stretching."""
        stretched = int(self.factor * self.original_max_position)
        return max(stated, stretched) if self.kind in ("dynamic", "yarn") else stated


class LayerKind(NamedTuple):
    """What a layer is made of: keys of blocks.MIXERS and blocks.FEED_FORWARDS."""

    mixer: str = "attention"
    feed_forward: str = "mlp"


class LayerNorms(NamedTuple):
    """The norms of a layer by their names in checkpoints; None where there is none."""

    before_mixer: str | None = "input_layernorm"
    after_mixer: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model's shape that its config.json says; sizes in elements.

    Attributes:
      windows: for each layer, how many tokens back attention reaches; 0 for all of them.
      attention_soft_cap: attention scores become `cap · tanh(score / cap)`; 0 for none.
      norms: which norms a layer has.
      fused: which of a layer's linear layers a checkpoint keeps as one, their outputs one after the other: its name,
        and theirs, such as ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")).
      layer_kinds: what each layer is made of; empty where all are attention and an MLP.
      qk_norm: whether queries and keys are normalised per head before the rotation.
      max_position: longest sequence that the model was made for.
      initializer_range: standard deviation of random weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int
    windows: tuple[int, ...]
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_soft_cap: float = 0.0
    norms: LayerNorms = LayerNorms()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    layer_kinds: tuple[LayerKind, ...] = ()
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} must be a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (with {self.hidden_size} hidden_size, {self.num_heads} num_attention_heads) "
                f"must be even and at least 2: pairs of dimensions are rotated"
            )
        for name in ("windows", "kinds"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"len(self.{name})={len(getattr(self, name))} must equal {self.num_layers=}")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is made of."""
        return self.layer_kinds or (LayerKind(),) * self.num_layers


# The computation's number formats by the names that configurations and command lines use.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
