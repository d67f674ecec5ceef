"""evaluate: see `python scripts/evaluate.py --help`."""

from qlora_jax.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
