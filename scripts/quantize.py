"""Quantize: see `python scripts/quantize.py --help`."""

from qlora_jax.cli.quantize import main

if __name__ == "__main__":
    raise SystemExit(main())
