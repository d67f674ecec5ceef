"""AdamW for the adapters, masked over the whole parameter tree so that frozen leaves get neither state nor update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.train.config import OptimSection


def learning_rate(config: OptimSection, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_ratio` of the steps, then constant, or falling to 0 at the last step."""
    warmup = round(config.warmup_ratio * steps)
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # The first step already moves: its rate is peak / warmup, not 0.
    start = config.learning_rate / warmup
    return optax.join_schedules(
        [optax.linear_schedule(start, config.learning_rate, max(warmup - 1, 1)), after], [warmup]
    )


def adamw(config: OptimSection, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping (0: none), then AdamW with decoupled weight decay."""
    update = optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(*clipping(config), update)


def clipping(config: OptimSection) -> list[optax.GradientTransformation]:
    """Clipping of the gradient's global norm, or nothing."""
    return [optax.clip_by_global_norm(config.clip)] if config.clip > 0 else []


def make_optimizer(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`tx` where `mask` (see `lora_mask`) is True; no state and a zero update where it is False.

    `optax.masked` alone would hand the frozen leaves' gradients through as their updates.
    """
    return optax.partition({True: tx, False: optax.set_to_zero()}, mask)


def fill_frozen(grads: Any, params: Any) -> Any:
    """Gradients over the whole tree: `grads` where it has them, zeros of the leaf's dtype where it has None."""

    def fill(p, g):
        # A packed weight has None for what it does not use: that is no leaf, and stays.
        return jnp.zeros_like(p) if g is None and p is not None else g

    return jax.tree.map(fill, params, grads, is_leaf=lambda node: node is None)
