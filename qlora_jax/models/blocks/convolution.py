"""The short causal convolution inside a mixer of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.kernels.convolution import causal_convolution
from qlora_jax.models.blocks.block import Leaf
from qlora_jax.models.blocks.context import Context, row_counts
from qlora_jax.models.blocks.linear import Frozen


class Convolution(nnx.Module):
    """A weighted sum of each channel's last K inputs, within a document. It is no linear layer: never packed."""

    def __init__(self, weight, bias=None, *, kind=Frozen):
        self.weight = kind(weight)
        self.bias = None if bias is None else kind(bias)

    def __call__(self, x: Float[Array, "B T C"], context: Context, inputs: Float[Array, "B W C"] | None):
        """Returns the sums `[B, T, C]` and the last K − 1 inputs; `inputs` are those of the tokens before."""
        bias = None if self.bias is None else self.bias.get_value()
        counts = row_counts(context, x.shape[0])
        return causal_convolution(x, self.weight.get_value(), bias, context.first, inputs, counts)


@dataclasses.dataclass(frozen=True)
class ConvolutionPart:
    """A convolution of so many channels over `kernel` tokens; `axis` names what the channels count."""

    channels: int
    kernel: int
    axis: str
    bias: bool = False

    def leaves(self) -> dict[str, Leaf]:
        shape, axes = (self.channels, 1, self.kernel), (self.axis, "one", "kernel")
        found = {"weight": Leaf(shape, axes, "array")}
        return found | ({"bias": Leaf(shape[:1], axes[:1], "bias", 0.0)} if self.bias else {})

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Convolution:
        return Convolution(values["weight"], values.get("bias"), kind=kind)
