"""Mixtures of experts: who goes to which expert, and products of sorted rows with the experts' weights."""

from qlora_jax.kernels.experts.matmul import expert_matmul
from qlora_jax.kernels.experts.routing import Routing, combine, gather, per_tile, route_rows

__all__ = ["Routing", "combine", "expert_matmul", "gather", "per_tile", "route_rows"]
