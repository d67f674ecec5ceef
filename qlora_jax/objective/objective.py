"""What training aims at: an objective measures a model on a batch, and says what becomes of the measurements."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from qlora_jax.config import Pieces
from qlora_jax.kernels.experts.router import balance_loss
from qlora_jax.models import Decoder

# A batch on the device, `[B, T]` each: what the objective names, and `embedded`, the tokens' rows of the embedding
# `[B, T, D]`, where that stays in host memory.
Arrays = Mapping[str, Array]
# What the forward pass reads.
MODEL_ARRAYS = ("tokens", "segment_ids", "positions")


class Measured(NamedTuple):
    """A model measured on one microbatch.

    Attributes:
      total: what is differentiated; the totals of a step's microbatches add up.
      sums: numbers by name, to be added over microbatches, and over the batches of an evaluation.
    """

    total: Float[Array, ""]
    sums: dict[str, Array]


class Objective(Protocol):
    """What a step lowers. Its methods are pure, and run inside jit."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of a batch that it needs, by their names in data.Batch."""

    def zeros(self) -> dict[str, Array]:
        """The sums of no microbatch, in their dtypes."""

    def measure(self, model: Decoder, batch: Arrays, pieces: Pieces, key: Array | None = None) -> Measured:
        """The measurements of a microbatch; `key` turns adapter dropout on."""

    def weight(self, sums: Mapping[str, Any]) -> Any:
        """What the gradient of the total is divided by, above 0. Of arrays in a step, of numbers in an evaluation."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """What is logged of the sums: `loss` and others. An evaluation's are `eval_…`, without `tokens`."""


def hidden_states(model: Decoder, batch: Arrays, pieces: Pieces, key: Array | None = None) -> Float[Array, "B T D"]:
    """The model's hidden states of a microbatch."""
    return run_model(model, batch, pieces, key)[0]


def run_model(
    model: Decoder, batch: Arrays, pieces: Pieces, key: Array | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, ""] | None]:
    """The model's hidden states of a microbatch, and its own loss beside the objective's: of how experts are used.

    The one place that runs a model on a microbatch.
    """
    hidden, balance = model.hidden_and_balance(
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        embedded=batch.get("embedded"),
        pieces=pieces,
        key=key,
    )
    return hidden, None if balance is None else model.config.balance * balance_loss(balance)
