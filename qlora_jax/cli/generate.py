"""`scripts/generate.py`: continue a prompt."""

import argparse
import json
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors
from qlora_jax.cli.model_arguments import add_model_arguments, model_source


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser("generate.py", description="Have a model continue a prompt.")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the text to continue; with --chat, what the user says"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the chat template as a user's message (so does --chat-template)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="write so many at most (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 (the default) takes the likeliest token; 1 draws by the model's probabilities",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens only (default: 0, all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together reach probability P (default: 1, all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens (default: 0)")
    parser.add_argument("--json", action="store_true", help='print {"text", "tokens"} instead of the text')
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the continuation, or one JSON object, on standard output."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.generation import Sampling
    from qlora_jax.run.generate import continuations
    from qlora_jax.run.text_model import Writing

    how = Writing(
        chat=options.chat or options.chat_template is not None,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
        seed=options.seed,
    )
    [found] = continuations(model_source(options), [options.prompt], how)
    print(json.dumps({"text": found.text, "tokens": found.tokens}) if options.json else found.text)
    return 0
