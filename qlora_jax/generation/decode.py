"""Generation: one jitted function that reads the prompts and then draws token after token on the device."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.generation.sampling import Sampling, sample
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.decoder import Decoder

SMALLEST_BUCKET = 32
GREEDY = Sampling()
NEVER = -1  # no token's id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a program is compiled for beside its shapes: how tokens are drawn, how many, and which end a text."""

    sampling: Sampling
    max_new_tokens: int
    stop_ids: tuple[int, ...]


class Generator:
    """Generates from one model. Prompts are padded to powers of two, so that few lengths are ever compiled.

    Args:
      graphdef, state: the model as `nnx.split` gives it.
      stop_ids: tokens that end a text; they are not part of what is returned.
    """

    def __init__(self, graphdef: nnx.GraphDef, *state: Any, stop_ids: Sequence[int]):
        self.graphdef, self.state = graphdef, state
        self.stop_ids = tuple(stop_ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[list[int]]:
        """The new token ids of each prompt, without the stop token.

        Args:
          max_new_tokens: at most as many, of all or of each. One number is compiled for; the largest of several is
            rounded up, so that few are.

        Raises:
          ValueError: an empty prompt, or fewer than one new token asked for.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(limits, default=1) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {min(limits)}")
        if not prompts or any(not prompt for prompt in prompts):
            raise ValueError("every prompt needs at least one token: give some text, or a tokenizer that adds a bos")
        tokens, counts = _padded(prompts)
        new = _generate(
            self.graphdef,
            self.state,
            tokens,
            counts,
            jax.random.key(seed),
            jnp.asarray(limits, jnp.int32),
            how=Drawing(
                sampling=sampling,
                max_new_tokens=max_new_tokens if isinstance(max_new_tokens, int) else bucket(max(limits)),
                stop_ids=self.stop_ids,
            ),
        )
        return [self._until_stop(row[:limit]) for row, limit in zip(np.asarray(new).tolist(), limits, strict=True)]

    def _until_stop(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.stop_ids]
        return row[: ends[0]] if ends else row


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """int32 tokens `[B, bucket]`, padding after each prompt, and how long each is: `[B]`, a scalar if all are as long.

    For a scalar the cache is written by slices, which is faster.
    """
    counts = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), bucket(max(counts))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(counts[0] if len(set(counts)) == 1 else counts, jnp.int32)


def bucket(length: int) -> int:
    """The length that so many tokens are padded to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("graphdef", "how"))
def _generate(
    graphdef,
    state,
    tokens: Int[Array, "B T"],
    counts,
    key,
    limits: Int[Array, " B"],
    how: Drawing,
) -> Int[Array, "B new"]:
    model: Decoder = nnx.merge(graphdef, *state)
    max_new_tokens, stops = how.max_new_tokens, jnp.array(how.stop_ids or (NEVER,), jnp.int32)

    def draw(hidden: Float[Array, "B D"], index):
        return sample(model.logits(hidden), jax.random.fold_in(key, index), how.sampling)

    def running(carry):
        _, _, done, index = carry
        return (index < max_new_tokens) & ~jnp.all(done)

    def step(carry):
        cache, out, done, index = carry
        hidden, cache = model.step(out[:, index - 1, None], cache)
        token = draw(hidden[:, 0], index)
        out = out.at[:, index].set(jnp.where(done, out[:, index], token))
        return cache, out, done | jnp.isin(token, stops) | (index + 1 >= limits), index + 1

    places = tokens.shape[1] + max_new_tokens
    dtype = model.embed_tokens.weight.get_value().dtype
    hidden, cache = model.step(tokens, empty_cache(model.config, tokens.shape[0], places, dtype), counts)
    first = draw(hidden[jnp.arange(tokens.shape[0]), counts - 1], 0)
    # Rows that have ended stay filled with a stop token.
    out = jnp.full((tokens.shape[0], max_new_tokens), stops[0], jnp.int32).at[:, 0].set(first)
    carry = (cache, out, jnp.isin(first, stops) | (limits <= 1), jnp.int32(1))
    return lax.while_loop(running, step, carry)[1]
