"""Floating-point operations that a train step executes, recomputation included: 2·M·N·K for each matrix product.

With T = batch · seq_len tokens, P the elements of a layer's projections, P_down those of down_proj, L layers, rank r:

    projections   2·T·L·(P forward + (P − P_down) recomputed + P backward)      the frozen weights have no gradient
    adapters      2·T·r·(N + K)·(1 forward + 1 recomputed + 2 backward)         less r·N recomputed at down_proj
    attention     4·share·batch·seq_len²·heads·head_dim·L·(1 forward + 1 recomputed + 2 backward)
    output layer  2·n·V·D·(1 forward + 1 recomputed + 1 backward)               n: scored positions, in whole chunks

Under full rematerialization the backward pass computes a layer again up to down_proj, whose output it does not need.
`share` is 1/2 in what is reported: the causal half, although an implementation with a mask computes the whole square,
and a flash kernel computes the scores once more. So the share of the peak is never flattered by attention.
Norms, rotations, the softmax, the optimizer and unpacking the weights are not counted.
"""

import math

from qlora_jax.lora import Target
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import adaptable

DOWN = "layers.mlp.down_proj"
CAUSAL = 0.5


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every projection of a layer by path."""
    return {path: param.shape for path, param in adaptable(config).items() if param.projection}


def train_flops(
    config: ModelConfig, targets: dict[str, Target], batch: int, seq_len: int, chunk: int, share: float = CAUSAL
) -> float:
    """Executed operations of one microbatch under full rematerialization; see this file's head."""
    tokens = batch * seq_len
    shapes = projections(config)
    layer = sum(math.prod(shape) for shape in shapes.values())
    total = 2 * tokens * config.num_layers * (3 * layer - math.prod(shapes[DOWN]))
    total += 2 * tokens * _adapters(config, targets)
    total += 4 * _attention(config, batch, seq_len, share)
    return total + 3 * _output(config, batch, seq_len, chunk)


def forward_flops(config: ModelConfig, batch: int, seq_len: int, chunk: int, share: float = CAUSAL) -> float:
    """Executed operations of a forward pass with its loss."""
    layer = sum(math.prod(shape) for shape in projections(config).values())
    total = 2 * batch * seq_len * config.num_layers * layer
    return total + _attention(config, batch, seq_len, share) + _output(config, batch, seq_len, chunk)


def _adapters(config: ModelConfig, targets: dict[str, Target]) -> int:
    """Multiplications per token of all adapters: forward, recomputed and backward. Stacks are padded to one rank."""
    total = 0
    for path, (n, k) in projections(config).items():
        modules = [tensor.module for tensor in adaptable(config)[path].tensors()]
        ranks = [targets[name].rank for name in modules if name in targets]
        if ranks:
            recomputed = k if path == DOWN else n + k
            total += config.num_layers * max(ranks) * (3 * (n + k) + recomputed)
    return total


def _attention(config: ModelConfig, batch: int, seq_len: int, share: float) -> float:
    return 4 * share * batch * seq_len**2 * sum(kind.mixer.widths[0] for kind in config.kinds)


def _output(config: ModelConfig, batch: int, seq_len: int, chunk: int) -> int:
    scored = math.ceil(batch * (seq_len - 1) / chunk) * chunk
    return 2 * scored * config.vocab_size * config.hidden_size
