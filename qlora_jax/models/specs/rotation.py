"""Rotary position embeddings: which dimensions turn, and how fast."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; each kind reads some of the fields.

    Attributes:
      kind: "default", "linear", "dynamic", "yarn", "longrope", "llama3" or "proportional".
      original_max_position: the longest text before stretching.
      attention_factor: what cosines and sines are multiplied by (yarn, longrope).
      beta_fast, beta_slow, truncate: between how many turns over the original length yarn blends, and whether at whole
        dimensions only.
      short_factors, long_factors: longrope's divisors `[dims / 2]` of the frequencies, for texts within the original
        length and beyond it.
      moving: how many pairs of dimensions turn at all (proportional); the others stand still.
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
    moving: int = 0

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")

    def longest(self, stated: int) -> int:
        """The longest text, of a configuration that states `stated` positions: some state those before stretching."""
        stretched = int(self.factor * self.original_max_position)
        return max(stated, stretched) if self.kind in ("dynamic", "yarn") else stated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary position embedding.

    Attributes:
      theta: the base of the frequencies.
      dims: how many of a head's dimensions are rotated, the first ones.
      pairs: whether neighbours are rotated against each other (0 with 1, 2 with 3); else the first half of the rotated
        dimensions against the second.
    """

    theta: float
    dims: int
    scaling: RopeScaling = RopeScaling()
    pairs: bool = False

    @property
    def still(self) -> "Rope":
        """The same without any rotation: for layers without positions among others that rotate."""
        return dataclasses.replace(self, scaling=RopeScaling(kind="proportional", moving=0))

    def __post_init__(self):
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"rotated dimensions of a head: {self.dims}, must be even and at least 2")
