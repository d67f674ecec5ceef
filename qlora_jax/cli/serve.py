"""`scripts/serve.py`: one base and many adapters behind OpenAI's API."""

import argparse
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from qlora_jax.run.load import add_model_arguments

    parser = argparse.ArgumentParser(
        "serve.py",
        description="Serve a model, and adapters of it, to clients of OpenAI's API. A page to try it is at /.",
    )
    add_model_arguments(parser, adapter=False)
    parser.add_argument(
        "--adapters", metavar="DIR", help="a folder whose subfolders are PEFT adapters; none: the model only"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=_port, default=8000, help="default: %(default)s; 0 takes a free one")
    parser.add_argument(
        "--public-host",
        action="append",
        default=[],
        metavar="NAME",
        help="by which a proxy before the server is called, such as llm.example.com; may be given again",
    )
    parser.add_argument("--api-key", metavar="KEY", help="asked of every client; better in QLORA_JAX_API_KEY")
    parser.add_argument(
        "--admin-key", metavar="KEY", help="allows adapters to be loaded and unloaded; better in QLORA_JAX_ADMIN_KEY"
    )
    for name, default, text in (
        ("slots", 8, "texts that are written at once"),
        ("max-loras", 8, "adapters on the GPU at once"),
        ("max-rank", 64, "the largest rank of an adapter"),
        ("max-length", 2048, "tokens of the longest text, prompt and answer together"),
        ("queue", 64, "requests that may wait; more get 429"),
        ("host-adapters", 64, "adapters in host memory at once"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="for running answers after SIGTERM (default: 30)"
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 0 to 65535")
    return int(text)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.run.serve import check_extra, serve

    check_extra()
    serve(options)
    return 0
