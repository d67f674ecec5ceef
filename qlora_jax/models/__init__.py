"""The decoder and its families."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import count_parameters, linear_modules, table

__all__ = ["Decoder", "ModelConfig", "count_parameters", "linear_modules", "table"]
