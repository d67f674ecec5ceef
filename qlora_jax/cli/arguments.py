"""Arguments of the commands that take a configuration: `--config FILE --config.section.field=value …`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from qlora_jax.config import SECTIONS, Config, Section, load_config
from qlora_jax.config.values import describe


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that requires `--config` and lists every field in --help; add the command's options to it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --config FILE [--config.section.field=value ...] [options]",
        description=description,
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a Python file with the configuration, e.g. configs/7b.py"
    )
    return parser


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """(the command's own options, the configuration with its overrides). Bad input exits with code 2."""
    own, overrides = split_arguments(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(own)
    try:
        return options, load_config(options.config, overrides)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own words, the `--config.…` words, each with its value if that is a word of its own)."""
    own: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        is_override = word.startswith("--config.")
        (overrides if is_override else own).append(word)
        if is_override and "=" not in word and words and not words[0].startswith("--"):
            overrides.append(words.pop(0))
    return own, overrides


def config_help() -> str:
    """Every field with its default and its description, one line each."""
    top = [item for item in fields(Config) if item.name not in SECTIONS]
    lines = ["configuration fields (default in brackets):"]
    lines += [_line("config", item, Config()) for item in top]
    for name in SECTIONS:
        section = getattr(Config(), name)
        lines += ["", *(_line(section.PREFIX, item, section) for item in fields(section))]
    return "\n".join(lines)


def _line(prefix: str, item: Field[Any], section: Section) -> str:
    choices = f": {describe(item.type)}" if "Literal" in str(item.type) else ""
    default = getattr(section, item.name)
    return f"  --{prefix}.{item.name:<{30 - len(prefix)}} {item.metadata['help']}{choices} [{default!r}]"
