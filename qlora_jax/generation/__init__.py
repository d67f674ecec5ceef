"""Sampling, and the decode loop with its key/value cache."""

from qlora_jax.generation.decode import Generator, bucket
from qlora_jax.generation.sampling import Sampling

__all__ = ["Generator", "Sampling", "bucket"]
