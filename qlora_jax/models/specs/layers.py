"""A layer: what it is made of, and in what it differs from others of its kind."""

from typing import NamedTuple

from qlora_jax.models.specs.feed_forward import BesideSpec, MLPSpec, MoESpec
from qlora_jax.models.specs.mixers import AttentionSpec, ConvSpec, DeltaSpec
from qlora_jax.models.specs.norms import LayerNorms
from qlora_jax.models.specs.rotation import Rope

MixerSpec = AttentionSpec | DeltaSpec | ConvSpec
FeedForwardSpec = MLPSpec | MoESpec | BesideSpec


class LayerKind(NamedTuple):
    """What a layer is made of. Layers of one kind may lie in one stack.

    Attributes:
      per_layer: elements of the input that each layer has of its own, beside x; 0 for none.
      scaled: whether a learned scalar multiplies the layer's output.
      source: the layer whose keys and values are read, for a mixer that borrows.
    """

    mixer: MixerSpec
    feed_forward: FeedForwardSpec
    norms: LayerNorms = LayerNorms()
    per_layer: int = 0
    scaled: bool = False
    source: int | None = None


class LayerSpec(NamedTuple):
    """A layer: its kind, and in what it may differ from others that are scanned with it.

    Attributes:
      window: how many tokens back attention reaches; 0 for all of them.
      rope: how queries and keys are rotated; None for not at all.
    """

    kind: LayerKind
    window: int = 0
    rope: Rope | None = None

    @property
    def alike(self) -> tuple[LayerKind, tuple[int, bool] | None]:
        """What layers that are scanned together have in common."""
        return self.kind, None if self.rope is None else (self.rope.dims, self.rope.pairs)
