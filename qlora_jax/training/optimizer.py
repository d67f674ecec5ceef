"""AdamW with its schedule and its clipping, over what is trained."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qlora_jax.config import OptimSection


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


def adamw(config: OptimSection, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping (0: none), then AdamW with decoupled weight decay.

    moments=bf16 stores the first moment alone so. The second one falls by 1 - beta2 = 0.1 % in a step, which is less
    than half of bfloat16's spacing (0.2 % to 0.4 %): rounded, it would never fall.
    """
    mu_dtype = {"fp32": None, "bf16": jnp.bfloat16}[config.moments]
    update = optax.adamw(
        schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mu_dtype=mu_dtype
    )
    return optax.chain(*clipping(config), update)


def clipping(config: OptimSection) -> list[optax.GradientTransformation]:
    """Clipping of the gradient's global norm, or nothing."""
    return [clip_by_norm(config.clip)] if config.clip > 0 else []


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for a caller who knows the norm and passes it to `update` as `norm`.

    A part of the gradient is so clipped as the whole one would be.
    """

    def update(updates, state, params=None, *, norm, **extra):
        # Optax' own arithmetic, to the last bit.
        clipped = jax.tree.map(lambda g: lax.select(norm < limit, g, g / norm.astype(g.dtype) * limit), updates)
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
