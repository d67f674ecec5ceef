"""compare: see `python scripts/compare.py --help`."""

from qlora_jax.cli.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
