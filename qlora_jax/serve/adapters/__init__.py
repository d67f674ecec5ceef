"""Adapters on disk, in host memory and on the device."""

from qlora_jax.serve.adapters.store import AdapterStore

__all__ = ["AdapterStore"]
