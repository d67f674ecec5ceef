"""What the user asks of the adapters."""

import dataclasses
import math
from collections.abc import Mapping

VARIANTS = ("lora", "rslora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapter hyperparameters, in PEFT's terms.

    Attributes:
      rank: rows of A and columns of B.
      alpha: numerator of the scale.
      dropout: probability of zeroing an input of A during training.
      targets: "all-linear" (every projection of the decoder), a tuple of module names (a whole path or its last parts),
        or a regular expression that must match a whole path.
      variant: "lora" scales by alpha / rank, "rslora" by alpha / sqrt(rank) (arXiv 2312.03732).
      rank_pattern: exceptions to `rank`: a module name, or a regular expression for the end of one, to its rank.
      alpha_pattern: likewise for `alpha`.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    variant: str = "lora"
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.rank < 1 or any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError(f"LoRA ranks must be at least 1, got {self.rank=} and {dict(self.rank_pattern)=}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {self.dropout}")
        if self.variant not in VARIANTS:
            raise ValueError(f"LoRA variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on B·A."""
        return alpha / math.sqrt(rank) if self.variant == "rslora" else alpha / rank
