"""The experts of a layer: two products for each, on tiles of rows that are sorted by expert."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.kernels.experts import Routing, combine, expert_matmul, gather, per_tile, route_rows
from qlora_jax.kernels.experts.router import Routed
from qlora_jax.models.blocks.activations import ACTIVATIONS
from qlora_jax.models.blocks.block import Block, Leaf, Part
from qlora_jax.models.blocks.linear import Weighted
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Cut, Piece
from qlora_jax.models.specs import MoESpec


class ExpertRouting(NamedTuple):
    """How tiles are sorted: for the frozen weights, and as the layer's adapter wants it."""

    base: Routing
    own: Any


class ExpertLinear(Weighted):
    """y = x · W[e]ᵀ + b[e] for the expert e of each tile, as its adapter changes it where there is one."""

    def __call__(self, x: Float[Array, "tiles side K"], routing: ExpertRouting) -> Float[Array, "tiles side N"]:
        """The products of every tile with its expert."""
        y = expert_matmul(x, self.weight.get_value(), routing.base)
        if self.bias is not None:
            y += per_tile(self.bias.get_value().astype(y.dtype), routing.base)[:, None]
        return y if self.lora is None else y + self.lora(x, routing.own)


@dataclasses.dataclass(frozen=True)
class ExpertsPart:
    """A projection of `outputs` and `inputs` for each of `experts`; `pieces` says what checkpoints make it of."""

    experts: int
    outputs: int
    inputs: int
    axes: tuple[str, str]
    weight: tuple[Piece, ...]
    bias: tuple[Piece, ...] = ()

    def leaves(self) -> dict[str, Leaf]:
        shape = self.outputs, self.inputs
        found = {"weight": Leaf(shape, self.axes, "expert", experts=self.experts, pieces=self.weight)}
        if self.bias:
            found["bias"] = Leaf(shape[:1], self.axes[:1], "bias", 0.0, experts=self.experts, pieces=self.bias)
        return found

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> ExpertLinear:
        return ExpertLinear(values["weight"], values.get("bias"), kind=kind)


class Experts(Block):
    """down(activation(gate_up(x))) of each token's experts, added up with the router's weights."""

    spec: MoESpec
    gate_up_proj: ExpertLinear
    down_proj: ExpertLinear

    @classmethod
    def parts(cls, spec: MoESpec, config: ModelConfig) -> dict[str, Part | None]:
        D, F = config.hidden_size, spec.inner

        def part(name: str, outputs: int, inputs: int, axes: tuple[str, str]) -> Part:
            weight, bias = (_pieces(spec, config, name, ending) for ending in ("weight", "bias"))
            return ExpertsPart(spec.experts, outputs, inputs, axes, weight, bias if spec.bias else ())

        return {
            "gate_up_proj": part("gate_up_proj", 2 * F, D, ("mlp", "embed")),
            "down_proj": part("down_proj", D, F, ("embed", "mlp")),
        }

    def __call__(self, x: Float[Array, "B T D"], routed: Routed) -> Float[Array, "B T D"]:
        """`routed`: of the B · T tokens, row by row."""
        tokens = x.reshape(-1, x.shape[-1])
        base = route_rows(routed.experts, self.spec.experts)
        both = self._through(self.gate_up_proj, gather(tokens, base), routed, base, len(x))
        y = self._through(self.down_proj, self._gated(both), routed, base, len(x))
        return combine(y, routed.weights, base).reshape(x.shape)

    def _through(self, linear: ExpertLinear, tiles, routed: Routed, base: Routing, rows: int):
        lora = linear.lora
        own = base if lora is None else lora.route(routed.experts, base, rows)
        return linear(tiles, ExpertRouting(base, own))

    def _gated(self, both: Float[Array, "tiles side F2"]) -> Float[Array, "tiles side F"]:
        spec = self.spec
        gate, up = (both[..., ::2], both[..., 1::2]) if spec.interleaved else jnp.split(both, 2, axis=-1)
        if spec.clipped is None:
            return ACTIVATIONS[spec.activation](gate) * up
        alpha, limit = spec.clipped
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _pieces(spec: MoESpec, config: ModelConfig, projection: str, ending: str) -> tuple[Piece, ...]:
    """The checkpoint's tensors that an expert's weight or bias is made of."""
    E, F, D, where = spec.experts, spec.inner, config.hidden_size, f"{spec.name}.experts"
    rows, columns = (2 * F, D) if projection == "gate_up_proj" else (D, F)
    if config.names.experts == "joint":
        return (Piece(f"{where}.{{expert}}.{projection}.{ending}"),)
    if config.names.experts == "fused":
        if ending == "bias":
            return (Piece(f"{where}.{projection}_bias", cut=Cut((E, rows))),)
        whole = (E, columns, rows) if spec.transposed else (E, rows, columns)
        return (Piece(f"{where}.{projection}", cut=Cut(whole, spec.transposed)),)
    gate, up, down = (f"{where}.{{expert}}.{name}.{ending}" for name in spec.each)
    return (Piece(gate, (0, F)), Piece(up, (F, 2 * F))) if projection == "gate_up_proj" else (Piece(down),)
