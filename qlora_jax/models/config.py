"""The geometry of a decoder, whatever family its checkpoint belongs to."""

import dataclasses

from qlora_jax.models.names import Names
from qlora_jax.models.specs import LayerKind, LayerSpec, NormSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayerInputs:
    """Inputs that each layer has of its own, beside x: `size` elements, from a table of `vocab` rows and from x."""

    size: int
    vocab: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model's shape that its config.json says; sizes in elements.

    Attributes:
      layers: what each layer is.
      norm: of the layers, before a block; and of the last hidden states and after a block where these are None.
      max_position: longest sequence that the model was made for.
      initializer_range: standard deviation of random weights.
      embedding_multiplier: of the embedding's rows, rounded to their dtype.
      embedding_norm: whether they are normalised, without weights.
      residual_multiplier: of what each block adds to x.
      logit_multiplier, logit_soft_cap: logits are multiplied, then become `cap · tanh(logit / cap)`; 0 for no cap.
      balance: factor of the experts' load-balancing loss in training; 0 for none.
      names: how checkpoints and transformers name the parameters.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_position: int
    after_norm: NormSpec | None = None
    final_norm: NormSpec | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_soft_cap: float = 0.0
    balance: float = 0.0
    per_layer: PerLayerInputs | None = None
    names: Names = Names()

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def experts(self) -> int:
        """How many experts a layer has at most; 0 where there are none."""
        return max((getattr(kind.feed_forward, "experts", 0) for kind in self.kinds), default=0)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is made of."""
        return tuple(layer.kind for layer in self.layers)


# The computation's number formats by the names that configurations and command lines use.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
