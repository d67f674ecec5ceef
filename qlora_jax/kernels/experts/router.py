"""Which experts a token goes to, with what weights: the rules of the model families, all in float32.

Each takes the router's logits; the sums that the load-balancing loss needs are taken of the same logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# DeepSeek's guard against weights that are all zero.
TINY = 1e-20


class Routed(NamedTuple):
    """k experts for each of T tokens, the first the likeliest: float32 weights, int32 indices."""

    weights: Float[Array, "T k"]
    experts: Int[Array, "T k"]


def softmax_top_k(
    logits: Float[Array, "T E"],
    k: int,
    *,
    renormalize: bool,
    scaling: float = 1.0,
    expert_scale: Float[Array, " E"] | None = None,
) -> Routed:
    """The k largest probabilities (Mixtral, Qwen, OLMoE, Gemma 4).

    Args:
      renormalize: divides a token's weights by their sum.
      scaling: multiplies all weights.
      expert_scale: multiplies the weights of each expert afterwards (Gemma 4's `per_expert_scale`).
    """
    weights, index = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)
    if renormalize:
        weights /= weights.sum(-1, keepdims=True)
    if expert_scale is not None:
        weights *= expert_scale.astype(jnp.float32)[index]
    return Routed(weights * scaling, index)


def top_k_softmax(logits: Float[Array, "T E"], k: int) -> Routed:
    """The softmax of the k largest logits alone (gpt-oss)."""
    largest, index = lax.top_k(logits.astype(jnp.float32), k)
    return Routed(jax.nn.softmax(largest, axis=-1), index)


def sigmoid_top_k(
    logits: Float[Array, "T E"],
    k: int,
    *,
    correction: Float[Array, " E"],
    renormalize: bool,
    groups: tuple[int, int] = (1, 1),
    scaling: float = 1.0,
) -> Routed:
    """Sigmoid scores, chosen by score + correction, weighted by the score alone (DeepSeek V3, GLM 4 MoE).

    Args:
      correction: what balances the choice. Nothing is derived by it.
      groups: (groups of neighbouring experts, how many of them a token may use): the best by the sum of their two best.
    """
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    choice = lax.stop_gradient(scores) + lax.stop_gradient(correction).astype(jnp.float32)
    index = lax.top_k(jnp.where(_in_best_groups(choice, *groups), choice, -jnp.inf), k)[1]
    weights = jnp.take_along_axis(scores, index, axis=-1)
    if renormalize:
        weights /= weights.sum(-1, keepdims=True) + TINY
    return Routed(weights * scaling, index)


def _in_best_groups(choice: Float[Array, "T E"], groups: int, used: int) -> Bool[Array, "T E"]:
    """Which experts are in the `used` best groups."""
    tokens, experts = choice.shape
    if experts % groups or experts // groups < min(2, experts) or used > groups:
        raise ValueError(
            f"{experts=} in {groups=} of which {used=}: expected equal groups of two experts at least, and no more "
            "used than there are: read n_group and topk_group of the model's config.json again"
        )
    if groups == used:
        return jnp.ones_like(choice, bool)
    best_two = lax.top_k(choice.reshape(tokens, groups, -1), 2)[0].sum(-1)
    best = jax.nn.one_hot(lax.top_k(best_two, used)[1], groups, dtype=bool).any(-2)
    return jnp.repeat(best, experts // groups, axis=-1)


class Balance(NamedTuple):
    """What the load-balancing loss is made of; those of several layers, or parts of a batch, add up.

    Attributes:
      chosen: float32 `[E]`, how often each expert was chosen.
      probability: float32 `[E]`, the sum of its probabilities.
      tokens: float32 scalar.
    """

    chosen: Float[Array, " E"]
    probability: Float[Array, " E"]
    tokens: Float[Array, ""]

    @classmethod
    def zero(cls, experts: int) -> "Balance":
        """Of no token."""
        return cls(jnp.zeros(experts), jnp.zeros(experts), jnp.float32(0))


def balance(logits: Float[Array, "T E"], k: int, counted: Bool[Array, " T"] | None = None) -> Balance:
    """One layer's sums. `counted`: False leaves a token out, as padding; all count where None."""
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    index = lax.top_k(lax.stop_gradient(probability), k)[1]
    own = jnp.ones(len(logits)) if counted is None else counted.astype(jnp.float32)
    chosen = jax.nn.one_hot(index, logits.shape[1], dtype=jnp.float32).sum(1)
    # jnp.where: what is left out may be NaN.
    kept = jnp.where(own[:, None] > 0, probability, 0)
    return Balance((chosen * own[:, None]).sum(0), kept.sum(0), own.sum())


def balance_loss(sums: Balance) -> Float[Array, ""]:
    """E · Σₑ (share of tokens that chose e) · (mean probability of e), of the Switch Transformer (arXiv 2101.03961).

    transformers' `load_balancing_loss_func`, which adds up all layers before it divides. 0 where no token counts.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    return len(sums.chosen) * jnp.sum((sums.chosen / tokens) * (sums.probability / tokens))
