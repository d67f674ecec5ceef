"""The configuration of a run: typed sections, checked on construction, read from Python files and JSON."""

from qlora_jax.config.files import apply_overrides, from_dict, load_config, to_dict
from qlora_jax.config.pieces import Pieces, VocabSlices
from qlora_jax.config.schema import (
    SECTIONS,
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    QuantSection,
    TrainSection,
    may_change,
)
from qlora_jax.config.section import Section

__all__ = [
    "SECTIONS",
    "Config",
    "DataSection",
    "LoraSection",
    "ModelSection",
    "OptimSection",
    "Pieces",
    "QuantSection",
    "Section",
    "TrainSection",
    "VocabSlices",
    "apply_overrides",
    "from_dict",
    "load_config",
    "may_change",
    "to_dict",
]
