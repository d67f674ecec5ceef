"""The commands behind scripts/ and `qlora-jax`."""
