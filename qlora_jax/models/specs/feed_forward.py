"""Blocks that treat tokens one by one."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """down(activation(gate(x)) · up(x)).

    Attributes:
      inner: elements between.
      activation: a name in blocks.activations.ACTIVATIONS.
      fused: whether one projection gives gates and ups, one after the other; then the first of `names` is its name.
      names: of the projections gate, up and down.
    """

    inner: int
    activation: str = "silu"
    bias: bool = False
    fused: bool = False
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    name: str = "mlp"

    @property
    def width(self) -> int:
        """Elements of a token between the projections."""
        return self.inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Which experts a token goes to.

    Attributes:
      rule: "softmax": the largest probabilities; "top_k_softmax": the softmax of the largest logits; "sigmoid": the
        largest scores, with a correction that only chooses.
      renormalize: whether a token's weights are divided by their sum.
      scaling: of all weights.
      wide: whether logits are computed in float32.
      bias: whether logits have one.
      correction: the name of the correction; empty where there is none.
      groups: (groups of experts, how many of them a token may use).
    """

    rule: Literal["softmax", "top_k_softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scaling: float = 1.0
    wide: bool = False
    bias: bool = False
    correction: str = ""
    groups: tuple[int, int] = (1, 1)
    name: str = "gate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A mixture of experts: each token goes through `top_k` of them, and perhaps through one that all share.

    Attributes:
      inner: elements between an expert's projections.
      activation: a name in blocks.activations.ACTIVATIONS.
      clipped: (α, limit) of gpt-oss' form, (up + 1) · gate · sigmoid(α · gate) with bounded gates and ups; or None.
      interleaved: whether gates and ups take turns among the rows of gate_up_proj; else gates come first.
      transposed: whether checkpoints that fuse experts keep `[expert, in, out]`.
      bias: whether experts have biases.
      each: the projections' names where checkpoints keep every expert for itself.
      shared: the expert that all share; `shared_gate` names a gate on its output, or nothing.
    """

    experts: int
    top_k: int
    inner: int
    router: RouterSpec
    activation: str = "silu"
    clipped: tuple[float, float] | None = None
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    each: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: MLPSpec | None = None
    shared_gate: str = ""
    name: str = "mlp"

    @property
    def width(self) -> int:
        """Elements of a token between the projections of all experts that it goes to."""
        return self.top_k * self.inner + (self.shared.inner if self.shared else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideSpec:
    """An MLP and a mixture of experts side by side, between norms of their own (Gemma 4)."""

    mlp: MLPSpec
    moe: MoESpec
    name: str = "beside"

    @property
    def width(self) -> int:
        """Elements of a token between the projections."""
        return self.mlp.width + self.moe.width
