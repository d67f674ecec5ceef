"""Loss and perplexity of a model on rows."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_jax.config import Pieces
from qlora_jax.data import Encoded, eval_batches, load_rows, pad_id
from qlora_jax.data.encoding import TrainOn, encode_rows
from qlora_jax.objective import SFT
from qlora_jax.run.load import ModelSource, opened
from qlora_jax.run.samples import Answerer
from qlora_jax.run.text_model import TextModel
from qlora_jax.training import step

# Entries of the vocabulary whose logits exist at once.
VOCAB_CHUNK = 16384


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over the scored tokens.

    Attributes:
      loss: their mean negative log-likelihood, in nats.
      perplexity: e to the loss; infinite where that is no float any more.
      tokens: how many there are.
      exact_match: the share of whole answers that are right, where it was asked for and rows have some.
    """

    loss: float
    perplexity: float
    tokens: int
    exact_match: float | None = None

    def figures(self) -> dict[str, float]:
        """Those that there are, by name."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}
        return found if self.exact_match is None else found | {"exact_match": self.exact_match}


def evaluate(
    model: TextModel | ModelSource | str | Path,
    data: str,
    *,
    split: str = "validation",
    train_on: TrainOn = "completions",
    seq_len: int | None = None,
    batch_size: int = 8,
    exact_match: bool = False,
) -> Evaluation:
    """Loss and perplexity of a model on the rows' scored tokens.

    Args:
      model: what `load` gives, or what to load: a folder, a name on the Hub, or a ModelSource with an adapter.
      data: a file, a folder, a pattern or a Hub dataset, in any format that training takes.
      split: of a folder or a Hub dataset.
      train_on: what is scored.
      seq_len: tokens of the longest row; the model's limit up to 2048 where None.
      exact_match: whether each row's answer is also generated and compared.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    rows = load_rows(data, split)  # before the model, which takes longer
    ready = opened(model)
    length = sequence_length(seq_len, ready.max_position)
    documents = encode_rows(rows, ready.tokenizer, seq_len=length, train_on=train_on)
    loss, tokens = measured_loss(ready, documents, batch_size)
    match = None
    if exact_match:
        answerer = Answerer(ready.parts, ready.tokenizer, stop_ids=ready.stop_ids, positions=ready.max_position)
        match = answerer.exact_match(documents).get("exact_match")
    return Evaluation(loss=loss, perplexity=perplexity(loss), tokens=tokens, exact_match=match)


def measured_loss(model: TextModel, documents: Sequence[Encoded], batch_size: int) -> tuple[float, int]:
    """(mean loss, number) of the documents' scored tokens."""
    longest = max(len(document.ids) for document in documents)
    pad = pad_id(model.tokenizer)
    # Rows are padded to the longest one only; rounding keeps the number of compiled shapes small.
    batches = eval_batches(documents, seq_len=-(-longest // 64) * 64, batch_size=batch_size, pad_id=pad)
    eval_step = step.make_eval_step(model.parts.graphdef, SFT(), Pieces(vocab_chunk=VOCAB_CHUNK))
    found = step.evaluate(eval_step, model.parts, batches)
    return found["loss"], int(found["tokens"])


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is no float any more."""
    return math.exp(loss) if not loss > math.log(sys.float_info.max) else math.inf


def sequence_length(asked: int | None, limit: int) -> int:
    """The longest row: what was asked for, or the model's limit up to 2048."""
    if asked is not None and asked > limit:
        raise ValueError(f"--seq-len {asked} is longer than the model's {limit} positions")
    return asked or min(limit, 2048)
