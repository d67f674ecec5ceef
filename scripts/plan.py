"""plan: see `python scripts/plan.py --help`."""

from qlora_jax.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
