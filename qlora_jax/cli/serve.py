"""`scripts/serve.py`: one base and many adapters behind OpenAI's API."""

import argparse
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors
from qlora_jax.cli.model_arguments import add_model_arguments

# Fields of EngineOptions, in words.
SIZES = {
    "slots": "texts that are written at once",
    "max_loras": "adapters on the GPU at once",
    "max_rank": "the largest rank that an adapter may have",
    "max_expert_rank": "the same on the experts of a mixture; 0 takes no adapters of experts, and no memory for them",
    "max_length": "tokens of the longest text, prompt and answer together",
    "queue": "requests that may wait; more are refused with status 429",
    "host_adapters": "adapters in host memory at once",
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from qlora_jax.serve import EngineOptions  # JAX reads its settings when it is imported

    parser = argparse.ArgumentParser(
        "serve.py",
        description="Answer clients of OpenAI's API with a model and its adapters. A page to try it is at /.",
    )
    add_model_arguments(parser, adapter=False)
    parser.add_argument(
        "--adapters",
        metavar="DIR",
        help="a folder whose subfolders are PEFT adapters; without it, the model alone is served",
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
        help="what a proxy before the server is called, such as llm.example.com; may be given more than once",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="every client has to send it; the variable QLORA_JAX_API_KEY hides it from others",
    )
    parser.add_argument(
        "--admin-key", metavar="KEY", help="who sends it may load and unload adapters; better in QLORA_JAX_ADMIN_KEY"
    )
    for name, text in SIZES.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(EngineOptions, name)
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running answers have after SIGTERM (default: 30)",
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
    from qlora_jax.run.serve import Listening, serve
    from qlora_jax.serve import EngineOptions

    sizes = {name: getattr(options, name) for name in SIZES}
    serve(
        options.model,
        options.adapters,
        engine=EngineOptions(quant=options.quant, dtype=options.dtype, **sizes),
        listening=Listening(
            host=options.host,
            port=options.port,
            public_hosts=options.public_host,
            api_key=options.api_key,
            admin_key=options.admin_key,
            drain=options.drain,
        ),
        chat_template=options.chat_template,
    )
    return 0
