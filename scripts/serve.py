"""serve: see `python scripts/serve.py --help`."""

from qlora_jax.cli.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
