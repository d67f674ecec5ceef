"""`scripts/train.py`: fine-tune a model by a configuration."""

from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.arguments import config_parser, parse_with_config
from qlora_jax.cli.errors import exit_code, reports_errors


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and leaves a run folder; exit code 128 + N when signal N stopped the run."""
    parser = config_parser("train.py", "Fine-tune a Hugging Face model with QLoRA, LoRA or in full.")
    _, config = parse_with_config(parser, argv)
    environment.prepare(deterministic=config.train.deterministic)
    from qlora_jax.run.train import train  # JAX reads its settings when it is imported

    return exit_code(train(config, progress=True).stopped)
