"""LFM2's mixer of tokens: a short convolution between two gates, with an optional state to go on from."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.models.blocks.block import Block, LinearPart, Part
from qlora_jax.models.blocks.context import Context, Own
from qlora_jax.models.blocks.convolution import Convolution, ConvolutionPart
from qlora_jax.models.blocks.linear import Linear, subkey
from qlora_jax.models.blocks.states import ConvState
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import ConvSpec


class ShortConv(Block):
    """out(C · convolution(B · x)), where one projection gives B, C and x."""

    Cache = ConvState
    CUTS = False  # a state is that after the last token, and no other
    spec: ConvSpec
    in_proj: Linear
    conv: Convolution
    out_proj: Linear

    @classmethod
    def parts(cls, spec: ConvSpec, config: ModelConfig) -> dict[str, Part | None]:
        D = config.hidden_size
        return {
            "in_proj": LinearPart(3 * spec.width, D, ("heads", "embed"), spec.bias),
            "conv": ConvolutionPart(spec.width, spec.kernel, "heads", spec.bias),
            "out_proj": LinearPart(D, spec.width, ("embed", "heads"), spec.bias),
        }

    def __call__(self, x: Float[Array, "B T D"], context: Context, own: Own, rope, cache=None):
        """Returns the output `[B, T, D]` and the cache with these tokens in it, None where there is none.

        Args:
          rope: not used: the convolution itself says which token comes after which.
          cache: of states.
        """
        key = subkey(own.key, "attention")
        before, after, x = jnp.split(self.in_proj(x, subkey(key, "in")), 3, axis=-1)
        y, inputs = self.conv(before * x, context, None if cache is None else cache.read(context.start).inputs)
        cache = None if cache is None else cache.write(ConvState(inputs))
        return self.out_proj(after * y, subkey(key, "out")), cache
