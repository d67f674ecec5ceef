"""`scripts/evaluate.py`: loss and perplexity of a model on a file."""

import argparse
import math
import sys
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors

# Entries of the vocabulary whose logits exist at once.
VOCAB_CHUNK = 16384


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from qlora_jax.run.load import add_model_arguments

    parser = argparse.ArgumentParser("evaluate.py", description="Loss and perplexity over the rows' scored tokens.")
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="rows in any format that training takes")
    parser.add_argument("--split", default="validation", help="split of a folder or a Hub dataset")
    parser.add_argument("--train-on", choices=("completions", "all"), default="completions", help="what is scored")
    parser.add_argument("--seq-len", type=int, default=None, help="longest row; the model's limit up to 2048")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--exact-match", action="store_true", help="also generate each row's answer and compare it")
    parser.add_argument("--json", action="store_true", help='print {"loss", "perplexity", "tokens"}; null is no number')
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures, or one JSON object, on standard output."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.data import load_rows
    from qlora_jax.data.encoding import encode_rows
    from qlora_jax.run.load import prepare_model
    from qlora_jax.training.metrics import to_line

    rows = load_rows(options.data, options.split)
    ready = prepare_model(options)
    documents = encode_rows(
        rows,
        ready.tokenizer,
        seq_len=sequence_length(options.seq_len, ready.max_position),
        train_on=options.train_on,
    )
    result = measure(ready, documents, batch_size=options.batch_size, answers=options.exact_match)
    if options.json:
        print(to_line(result), end="")
    else:
        print("\n".join(f"{name:12} {value:.6g}" for name, value in result.items()))
    return 0


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is no float any more."""
    return math.exp(loss) if not loss > math.log(sys.float_info.max) else math.inf


def sequence_length(asked: int | None, limit: int) -> int:
    """The longest row: what was asked for, or the model's limit up to 2048."""
    if asked is not None and asked > limit:
        raise ValueError(f"--seq-len {asked} is longer than the model's {limit} positions")
    return asked or min(limit, 2048)


def measure(ready, documents, *, batch_size: int, answers: bool) -> dict[str, float]:
    """loss, perplexity and tokens over the documents, and exact_match where `answers` asks for it."""
    from qlora_jax.data import eval_batches, pad_id
    from qlora_jax.run.samples import Answerer
    from qlora_jax.training.step import evaluate, make_eval_step

    parts, tokenizer = ready.parts, ready.tokenizer
    longest = max(len(document.ids) for document in documents)
    # Rows are padded to the longest one only; rounding keeps the number of compiled shapes small.
    batches = eval_batches(documents, seq_len=-(-longest // 64) * 64, batch_size=batch_size, pad_id=pad_id(tokenizer))
    loss, tokens = evaluate(make_eval_step(parts.graphdef, loss_chunk=256, vocab_chunk=VOCAB_CHUNK), parts, batches)
    result = {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}
    if answers:
        answerer = Answerer(parts, tokenizer, stop_ids=ready.stop_ids, positions=ready.max_position)
        result |= answerer.exact_match(documents)
    return result
