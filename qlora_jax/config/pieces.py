"""In what pieces a step is computed: what decides its memory and leaves its result as it is."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from qlora_jax.config.section import AT_LEAST_ONE, AT_LEAST_ZERO, Section, option

# Matrix products of a GPU like sizes of this multiple.
ALIGNMENT = 128


@dataclass(frozen=True)
class VocabSlices:
    """The vocabulary in `count` slices of `size` tokens; the last one begins early enough to be whole."""

    count: int
    size: int
    vocab: int


@dataclass(frozen=True, kw_only=True)
class Pieces(Section):
    """What of a step exists at once. Who computes asks it how much, and passes it on as it is."""

    PREFIX: ClassVar[str] = "config.train"

    remat: Literal["full", "none", "dots", "offload"] = option(
        "full", "what the backward pass recomputes; offload keeps the layers' inputs in host memory", resume="free"
    )
    mlp_chunk: int = option(
        0, "tokens of a sequence that go through an MLP at once; 0: all", AT_LEAST_ZERO, resume="free"
    )
    loss_chunk: int = option(256, "tokens whose logits exist at once", AT_LEAST_ONE, resume="free")
    vocab_chunk: int = option(0, "vocabulary entries whose logits exist at once; 0: all", AT_LEAST_ZERO, resume="free")

    def mlp_tokens(self, tokens: int) -> int:
        """How many of a row's tokens go through an MLP at once."""
        return min(tokens, self.mlp_chunk or tokens)

    def loss_tokens(self, tokens: int) -> int:
        """How many tokens of a microbatch have logits at once."""
        return min(tokens, self.loss_chunk)

    def vocab_slices(self, vocab: int) -> VocabSlices | None:
        """Equal slices of about vocab_chunk tokens or fewer; None, which is the whole vocabulary, where that is 0."""
        if self.vocab_chunk == 0:
            return None
        even = -(-vocab // -(-vocab // self.vocab_chunk))
        size = -(-even // ALIGNMENT) * ALIGNMENT
        return VocabSlices(-(-vocab // size), size, vocab) if size < vocab else None

    def of_layers(self) -> "Pieces":
        """What concerns the layers alone."""
        return Pieces(remat=self.remat, mlp_chunk=self.mlp_chunk)

    def of_loss(self) -> "Pieces":
        """What concerns the loss alone, for a forward pass that no backward pass follows: it keeps nothing anyway."""
        return replace(FORWARD, loss_chunk=self.loss_chunk, vocab_chunk=self.vocab_chunk)


# A forward pass by itself: nothing is kept, so that there is nothing to compute again.
FORWARD = Pieces(remat="none")
