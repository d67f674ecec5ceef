"""The NF4 matmul with its derivative: the one dispatch point between the model and the kernels."""

import functools
import math
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from qlora_jax.kernels.backend import chosen
from qlora_jax.kernels.dequantize import dequantize
from qlora_jax.kernels.matmul import reference
from qlora_jax.kernels.tiles import MatmulTiles, tiles_for
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor

Weight = NF4Tensor | NF4Layer


def nf4_matmul(x: Float[Array, "*B K"], weight: Weight) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ for a packed `W[N, K]`; differentiable in x only.

    Few rows of x take the fused kernel, where one is chosen and fits; more are worth dequantizing the weight once.
    """
    return nf4_matmul_group(x, [weight])[0]


def nf4_matmul_transposed(dy: Float[Array, "*B N"], weight: Weight) -> Float[Array, "*B K"]:
    """dx = dy · dequantize(W): what the derivative of `nf4_matmul` computes."""
    return _matmul_backward(NF4Layer.of(weight), dy)[0]


def nf4_matmul_group(x: Float[Array, "*B K"], weights: Sequence[Weight]) -> list[Float[Array, "*B N"]]:
    """`nf4_matmul` of one x with several weights; one launch of the fused kernel serves them all."""
    layers = [NF4Layer.of(weight) for weight in weights]
    tiles = _fused_tiles(x, layers)
    if tiles is None:
        return [_matmul(x, layer) for layer in layers]
    return _fused(tiles, x, layers)


def _fused_tiles(x, layers: Sequence[NF4Layer]) -> MatmulTiles | None:
    """The fused kernel's sizes for these operands; None where dequantizing first is the way."""
    choice = chosen(str(x.dtype))
    if choice.name != "triton":
        return None
    from qlora_jax.kernels.matmul import triton  # where no kernel runs, Pallas is neither needed nor loaded

    tiles = tiles_for(choice.capability).for_tokens(math.prod(x.shape[:-1]))
    return tiles if tiles and triton.fits(layers, x.dtype, tiles) else None


@jax.custom_vjp
def _matmul(x, layer: NF4Layer):
    x, layer = _held_back(x, layer)
    return reference.forward(x, layer, dequantize)


def _matmul_forward(x, layer):
    # What is kept for the backward pass is the packed weight: it is dequantized once more there, so that no 16-bit
    # copy outlives the forward pass.
    return _matmul(x, layer), layer


def _matmul_backward(layer, dy):
    # Held back once more: else XLA sees the same dequantization in both passes and keeps the first one's result.
    dy, layer = _held_back(dy, layer)
    return reference.backward(dy, layer, dequantize), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _held_back(x, layer: NF4Layer):
    """Ties the weight to x, so that XLA dequantizes it no earlier than x is there."""
    if layer.stack.codes.shape[0] == 1:
        # The index of a stack of one says nothing: XLA drops it.
        return jax.lax.optimization_barrier((x, layer))
    x, index = jax.lax.optimization_barrier((x, layer.index))
    return x, layer._replace(index=index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(tiles: MatmulTiles, x, layers: list[NF4Layer]):
    from qlora_jax.kernels.matmul import triton

    def kernel(x, layers):
        flat = x.reshape(-1, x.shape[-1])
        return [y.reshape(*x.shape[:-1], -1) for y in triton.matmul(flat, layers, tiles)]

    def default(x, layers):
        return [reference.forward(x, layer) for layer in layers]

    return jax.lax.platform_dependent(x, layers, cuda=kernel, default=default)


def _fused_forward(tiles, x, layers):
    return _fused(tiles, x, layers), layers


def _fused_backward(tiles, layers, dys):
    return sum(_matmul_backward(layer, dy)[0] for layer, dy in zip(layers, dys, strict=True)), None


_fused.defvjp(_fused_forward, _fused_backward)
