"""Objectives of training, by name."""

from qlora_jax.config import Config
from qlora_jax.objective.objective import Measured, Objective, hidden_states
from qlora_jax.objective.sft import SFT

OBJECTIVES = {"sft": SFT}

__all__ = ["OBJECTIVES", "SFT", "Measured", "Objective", "hidden_states", "objective_of"]


def objective_of(config: Config) -> Objective:
    """The objective of a run. There is one so far, and no field that names another."""
    return OBJECTIVES["sft"]()
