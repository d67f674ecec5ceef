"""`scripts/evaluate.py`: loss and perplexity of a model on a file."""

import argparse
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors
from qlora_jax.cli.model_arguments import add_model_arguments, model_source


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        "evaluate.py", description="Measure a model's loss and perplexity on the answers in rows."
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="rows in any format that train.py takes")
    parser.add_argument("--split", default="validation", help="of a folder or a Hub dataset (default: validation)")
    parser.add_argument(
        "--train-on",
        choices=("completions", "all"),
        default="completions",
        help="score the tokens of the answers (the default), or all",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="cut longer rows (default: the model's limit, 2048 at most)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default: 8)")
    parser.add_argument("--exact-match", action="store_true", help="also write each answer and count the right ones")
    parser.add_argument(
        "--json", action="store_true", help='print {"loss", "perplexity", "tokens"}; null where that is no number'
    )
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures, or one JSON object, on standard output."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.run.evaluate import evaluate
    from qlora_jax.training.metrics import to_line

    found = evaluate(
        model_source(options),
        options.data,
        split=options.split,
        train_on=options.train_on,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        exact_match=options.exact_match,
    ).figures()
    if options.json:
        print(to_line(found), end="")
    else:
        print("\n".join(f"{name:12} {value:.6g}" for name, value in found.items()))
    return 0
