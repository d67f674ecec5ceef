"""generate: see `python scripts/generate.py --help`."""

from qlora_jax.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
