"""The geometry of a decoder, whatever family its checkpoint belongs to."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts. `kind` is "default", "linear" or "llama3"."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model's shape that its config.json says; sizes in elements.

    Attributes:
      windows: for each layer, how many tokens back attention reaches; 0 for all of them.
      attention_soft_cap: attention scores become `cap · tanh(score / cap)`; 0 for none.
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
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)=} must equal {self.num_layers=}")


# The computation's number formats by the names that configurations and command lines use.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
