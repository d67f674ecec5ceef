"""LoRA on the experts of a mixture: a pair A, B for each expert, on tiles of rows that are sorted by expert."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.kernels.experts.routing import Routing, per_tile, regroup, route_rows, side_for
from qlora_jax.lora.adapter import AdapterScale, ExpertAdapter, PeftName, Shape, Site
from qlora_jax.lora.init import init_pair
from qlora_jax.lora.low_rank import Pair, low_rank_delta, low_rank_update, misfit, stack_pairs
from qlora_jax.lora.rows import Served
from qlora_jax.lora.targets import Target
from qlora_jax.quant.packed import ByLayer


class ExpertLoRA(ExpertAdapter):
    """Δ(x) = scale · (x · A[e]ᵀ) · B[e]ᵀ for the expert e of each tile. There is no dropout, as in PEFT.

    Attributes:
      A: float `[*L, E, r, K]`. B: float `[*L, E, N, r]`.
      scale: float32 `[*L]`: an adapter has one for all experts of a layer.
    """

    Parts = Pair
    NAMES = {matrix: PeftName(f"lora_{matrix}", ".weight", 2) for matrix in "AB"}

    def __init__(self, A, B, scale):
        self.A, self.B = nnx.LoRAParam(A), nnx.LoRAParam(B)
        self.scale = AdapterScale(scale)

    @classmethod
    def start(cls, key: Array, name: str, target: Target | None, shape: Shape, site: Site) -> Pair:
        return Pair(*init_pair(key, name, target, shape[:3], site.dtype, (shape.experts,)))

    @classmethod
    def of(cls, parts: Pair, scale: Any, dropout: float) -> "ExpertLoRA":
        assert not dropout, "check_dropout refuses it before"
        return cls(jnp.asarray(parts.A), jnp.asarray(parts.B), jnp.asarray(scale))

    @classmethod
    def stacked(cls, parts: list[Any], shape: Shape, dtype: Any) -> Pair:
        return stack_pairs(parts, shape, dtype)

    @classmethod
    def check_shapes(cls, parts: Pair, shape: Shape) -> tuple[str, tuple, tuple] | None:
        return misfit(parts, shape)

    @classmethod
    def size(cls, shape: Shape) -> int:
        return shape.experts * shape.rank * (shape.outputs + shape.inputs)

    @classmethod
    def merge(
        cls, weight: np.ndarray, parts: Pair, scale: float, rows: slice = slice(None), expert: int = 0
    ) -> np.ndarray:
        """W[e] + scale · B[e]·A[e], added in float32 and cast once to the dtype of W[e] `[N, K]`."""
        delta = low_rank_delta(parts.A[expert], parts.B[expert][rows], scale)
        return (weight.astype(np.float32) + delta).astype(weight.dtype)

    def parts(self, layer: int | None, rank: int) -> Pair:
        A, B = np.asarray(self.A.get_value()), np.asarray(self.B.get_value())
        A, B = (A, B) if layer is None else (A[layer], B[layer])
        return Pair(A[:, :rank], B[..., :rank])

    def route(self, index: Int[Array, "T k"], base: Routing, rows: int) -> Routing:
        return base

    def __call__(self, x: Float[Array, "tiles side K"], routing: Routing) -> Float[Array, "tiles side N"]:
        """The update of one layer's tiles, in the dtype of x."""
        # Cast before the tiles take their parts: half the bytes, and all that a tapped parameter allows.
        A, B = (per_tile(part.get_value().astype(x.dtype), routing) for part in (self.A, self.B))
        scale = self.scale.get_value()
        return jax.vmap(lambda x, A, B: low_rank_update(x, A, B, scale))(x, A, B)


def to_peft(pair: Pair) -> Pair:
    """One layer's A `[E, r, K]`, B `[E, N, r]` as PEFT's files have them: `[E·r, K]`, and `[N, r·E]` expert fastest."""
    A, B = pair
    return Pair(A.reshape(-1, A.shape[-1]), np.moveaxis(B, 0, -1).reshape(B.shape[1], -1))


def from_peft(pair: Pair, experts: int) -> Pair:
    """The inverse of `to_peft`.

    Raises:
      ValueError: arrays that no adapter of so many experts has.
    """
    A, B = pair
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % experts:
        raise ValueError(
            f"lora_A {A.shape} and lora_B {B.shape} of {experts=}: expected [experts·r, in] and [out, r·experts]; "
            "is the adapter one of this model?"
        )
    return Pair(A.reshape(experts, -1, A.shape[-1]), np.moveaxis(B.reshape(len(B), -1, experts), -1, 0))


class ExpertAdapterStack(NamedTuple):
    """The served adapters of experts, for all layers of a decoder; ranks below r are padded with zeros.

    Attributes:
      A: `[L, slots, E, r, K]`. B: `[L, slots, E, N, r]`.
      scale: float32 `[L, slots]`.
    """

    A: Float[Array, "L slots E r K"]
    B: Float[Array, "L slots E N r"]
    scale: Float[Array, "L slots"]


class RowExperts(NamedTuple):
    """A stack, which of its slots each row of the batch takes, and which layer it is, as RowAdapters has it."""

    stack: ExpertAdapterStack
    slots: Int[Array, " B"]
    layer: Int[Array, ""] | None = None

    def at_layer(self, index: Int[Array, ""]) -> "RowExperts":
        """Those of one layer, by reference."""
        return self._replace(layer=index)


# A loop over layers reads the stacks where they lie.
ByLayer.register(RowExperts)


class RowRouting(NamedTuple):
    """Two orders of the same pairs of token and expert.

    Attributes:
      base: in tiles of one expert each, for the frozen weights.
      own: in tiles of one expert and one row of the batch each, for the adapters: its groups are row · E + expert.
    """

    base: Routing
    own: Routing


def route_adapters(index: Int[Array, "T k"], base: Routing, rows: int) -> RowRouting:
    """Tiles for adapters that differ from row to row of the batch; the T tokens are those of row 0, then of row 1, ….

    A generated token is alone in its group, and has a tile of one row: XLA then reads A and B where they lie.
    """
    experts = base.experts
    if rows == 1:
        return RowRouting(base, base)
    row = jnp.arange(len(index), dtype=jnp.int32) // (len(index) // rows)
    groups = rows * experts
    side = 1 if index.size <= groups else side_for(index.size, groups)
    return RowRouting(base, route_rows(row[:, None] * experts + index, groups, side))


def row_update(
    x: Float[Array, "tiles side K"], adapters: RowExperts, routing: RowRouting
) -> Float[Array, "tiles side N"]:
    """The update of the base's tiles, each row with the adapter of its own row of the batch, in the dtype of x.

    No tile holds rows of two adapters, so a NaN of one stays there.
    """
    stack, slots, layer = adapters
    base, own = routing
    if own is not base:
        x = regroup(x, base, own)
    row, expert = jnp.divmod(own.expert, base.experts)
    slot = slots[row]
    y = jax.vmap(low_rank_update)(
        x, stack.A[layer, slot, expert], stack.B[layer, slot, expert], stack.scale[layer, slot]
    )
    return y if own is base else regroup(y, own, base)


class RowExpertLoRA(nnx.Module):
    """`row_update` as a module of experts asks for it."""

    def __init__(self, adapters: RowExperts):
        self.adapters = Served(adapters)

    def route(self, index: Int[Array, "T k"], base: Routing, rows: int) -> RowRouting:
        """As ExpertAdapter has it."""
        return route_adapters(index, base, rows)

    def __call__(self, x: Float[Array, "tiles side K"], routing: RowRouting) -> Float[Array, "tiles side N"]:
        """The update in the dtype of x."""
        return row_update(x, self.adapters.get_value(), routing)
