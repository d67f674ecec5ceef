"""train: see `python scripts/train.py --help`."""

from qlora_jax.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
