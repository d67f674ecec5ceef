"""One base, many adapters: an engine that batches requests for different ones; a server that speaks OpenAI's API."""

from qlora_jax.serve.engine import Engine
from qlora_jax.serve.loading import open_engine
from qlora_jax.serve.sizes import Base, EngineOptions, Sizes

__all__ = ["Base", "Engine", "EngineOptions", "Sizes", "open_engine"]
