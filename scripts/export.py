"""export: see `python scripts/export.py --help`."""

from qlora_jax.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
