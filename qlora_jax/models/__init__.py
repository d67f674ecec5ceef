"""The decoder and its families."""

from qlora_jax.models.config import ModelConfig, RopeScaling
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import count_parameters, linear_modules, table

__all__ = ["Decoder", "ModelConfig", "RopeScaling", "count_parameters", "linear_modules", "table"]
