"""`scripts/generate.py`: continue a prompt."""

import argparse
import json
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from qlora_jax.run.load import add_model_arguments

    parser = argparse.ArgumentParser("generate.py", description="Continue a prompt.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="raw text; with --chat the user's message")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the chat template (so does --chat-template)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k best tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the best tokens that reach probability p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help='print {"text", "tokens"} instead of the text')
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the continuation, or one JSON object, on standard output."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.generation import Generator, Sampling
    from qlora_jax.run.load import prepare_model

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    ready = prepare_model(options)
    ids = prompt_ids(ready.tokenizer, options.prompt, chat=options.chat or options.chat_template is not None)
    if len(ids) + options.max_new_tokens > ready.max_position:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {options.max_new_tokens} exceed the model's "
            f"{ready.max_position} positions: shorten one of them"
        )
    generator = Generator(ready.parts.graphdef, ready.parts.adapters, ready.parts.base, stop_ids=ready.stop_ids)
    [tokens] = generator.generate([ids], max_new_tokens=options.max_new_tokens, sampling=sampling, seed=options.seed)
    text = ready.tokenizer.decode(tokens, skip_special_tokens=True)
    print(json.dumps({"text": text, "tokens": tokens}) if options.json else text)
    return 0


def prompt_ids(tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of raw text with the tokenizer's own special tokens, or of a user's message in the chat template."""
    from qlora_jax.data.prompt import chat_ids, text_ids

    if not chat:
        return text_ids(prompt, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat: the model's tokenizer has no chat template: give one with --chat-template FILE (or chatml), or "
            "leave --chat out and format the prompt"
        )
    return chat_ids([{"role": "user", "content": prompt}], tokenizer)
