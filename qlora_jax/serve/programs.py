"""What the engine runs on the device, as pure functions: reading a piece of a prompt, and a token for every row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from qlora_jax.generation.sampling import RowSampling, sample_rows
from qlora_jax.lora.experts import ExpertAdapterStack, RowExpertLoRA, RowExperts
from qlora_jax.lora.rows import AdapterStack, RowAdapters, RowLoRA
from qlora_jax.models.adapters import linears
from qlora_jax.models.cache import Cache
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import adaptable

# The most of the likeliest tokens that a request can have beside each token.
TOP_LOGPROBS = 20
# Tokens of a prompt whose scores over the vocabulary exist at once, where the prompt is scored.
SCORED_AT_ONCE = 16
# In the place of a token that the host does not know yet: the one that the step before has drawn for this row.
DRAWN_BEFORE = -1


class Rows(NamedTuple):
    """What the rows of a step are given.

    Attributes:
      tokens: int32, the row's last token, which is read now, or DRAWN_BEFORE.
      lengths: how many tokens of the row are in the cache; as many as it has room for where the row does nothing.
      counts: 1, or 0 where the row does nothing.
      slots: the adapter's place in the stacks, 0 for none.
      seeds: the two words of a request's seed.
      drawn: how many tokens the request has drawn before.
      scored: whether the request asks for log probabilities.
    """

    tokens: Int[Array, " B"]
    lengths: Int[Array, " B"]
    counts: Int[Array, " B"]
    slots: Int[Array, " B"]
    sampling: RowSampling
    seeds: UInt32[Array, "B 2"]
    drawn: Int[Array, " B"]
    scored: Bool[Array, " B"]


class PromptPiece(NamedTuple):
    """A piece of one row's prompt.

    Attributes:
      row: int32, which row of the cache.
      tokens: `length` tokens and padding.
      rows: of this row alone; `rows.tokens` and `rows.counts` are not used.
      targets: the token after each, whose log probability is computed if `scored`.
    """

    row: Int[Array, ""]
    tokens: Int[Array, "1 T"]
    length: Int[Array, ""]
    rows: Rows
    targets: Int[Array, " T"]
    scored: Bool[Array, ""]


class Scores(NamedTuple):
    """Log probabilities (natural, before temperature) of tokens, and the likeliest ones in their places."""

    logprobs: Float[Array, " T"]
    top_ids: Int[Array, "T top"]
    top_logprobs: Float[Array, "T top"]


class Drawn(NamedTuple):
    """The next token of every row. `sound`: whether all its scores were finite. `scores` are zeros if no row asks."""

    tokens: Int[Array, " B"]
    sound: Bool[Array, " B"]
    scores: Scores


def with_adapters(
    graphdef: nnx.GraphDef, base: Any, stacks: dict[str, AdapterStack | ExpertAdapterStack], slots
) -> Decoder:
    """The model whose rows take the adapters in `slots`, int32 `[B]`."""
    model: Decoder = nnx.merge(graphdef, *base)
    params = adaptable(model.config)
    for path, linear in linears(model):
        if path in stacks:
            # A loop over layers says which layer it is; what stands outside them has one.
            own: Any = stacks[path], slots, None if params[path].layers else jnp.int32(0)
            linear.lora = RowExpertLoRA(RowExperts(*own)) if params[path].experts else RowLoRA(RowAdapters(*own))
    return model


def decode(graphdef, base, stacks, texts, before: Int[Array, " B"], rows: Rows) -> tuple[dict[str, Any], Drawn]:
    """Reads every row's last token and draws the next one. `texts`, a Cache's layers, are written in place.

    Args:
      before: the tokens that the step before has drawn, for rows whose own are DRAWN_BEFORE.
    """
    model = with_adapters(graphdef, base, stacks, rows.slots)
    tokens = jnp.where(rows.tokens == DRAWN_BEFORE, before, rows.tokens)
    hidden, cache = model.step(tokens[:, None], Cache(texts, rows.lengths), rows.counts)
    return cache.layers, draw(model.logits(hidden[:, 0]), rows)


def prefill(graphdef, base, stacks, texts, piece: PromptPiece) -> tuple[dict[str, Any], Drawn, Scores]:
    """Reads a piece of one row's prompt and draws the token after it. `texts` are written in place."""
    row, tokens, length, rows, targets, scored = piece
    model = with_adapters(graphdef, base, stacks, rows.slots)
    lengths = jnp.broadcast_to(rows.lengths, jax.tree.leaves(texts)[0].shape[1])
    hidden, cache = model.step(tokens, Cache(texts, lengths), length[None], row)
    logits = model.logits(lax.dynamic_index_in_dim(hidden, length - 1, 1, keepdims=False))
    scores = lax.cond(scored, lambda: score_prompt(model, hidden[0], targets), lambda: no_scores(len(targets), model))
    return cache.layers, draw(logits, rows), scores


def draw(logits: Float[Array, "B V"], rows: Rows) -> Drawn:
    """Each row's next token by its own sampling, seed and count of tokens."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.seeds), rows.drawn)
    tokens = sample_rows(logits, keys, rows.sampling)
    empty = _empty(*logits.shape)
    scores = lax.cond(jnp.any(rows.scored), lambda: score(logits, tokens), lambda: empty)
    return Drawn(tokens, jnp.all(jnp.isfinite(logits), axis=-1), scores)


def score(logits: Float[Array, "T V"], tokens: Int[Array, " T"]) -> Scores:
    """The tokens' log probabilities, and the likeliest tokens."""
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top, ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    return Scores(chosen, ids.astype(jnp.int32), top)


def score_prompt(model: Decoder, hidden: Float[Array, "T D"], targets: Int[Array, " T"]) -> Scores:
    """`score` of all places of a prompt, a few at a time: no array `[T, V]` exists."""
    pieces = hidden.reshape(-1, SCORED_AT_ONCE, hidden.shape[-1]), targets.reshape(-1, SCORED_AT_ONCE)
    scores = lax.map(lambda piece: score(model.logits(piece[0]), piece[1]), pieces)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scores)


def no_scores(length: int, model: Decoder) -> Scores:
    return _empty(length, model.config.vocab_size)


def _empty(length: int, vocabulary: int) -> Scores:
    top = (length, min(TOP_LOGPROBS, vocabulary))
    return Scores(jnp.zeros(length), jnp.zeros(top, jnp.int32), jnp.zeros(top))


def install(stack: Any, slot, A: Float[Array, "L *E r K"], B: Float[Array, "L *E N r"], scale) -> Any:
    """The stack with another adapter in one slot, padded with zeros to the stack's rank; written in place."""
    missing, rest = (0, stack.A.shape[-2] - A.shape[-2]), [(0, 0)] * (A.ndim - 2)
    A, B = jnp.pad(A, (*rest, missing, (0, 0))), jnp.pad(B, (*rest, (0, 0), missing))
    return type(stack)(stack.A.at[:, slot].set(A), stack.B.at[:, slot].set(B), stack.scale.at[:, slot].set(scale))


def clear(texts: dict[str, Any], row) -> dict[str, Any]:
    """The cache with zeros in one row; written in place. What is not finite would outlive its text: 0 · NaN is NaN."""
    return jax.tree.map(lambda a: a.at[:, row].set(0), texts)
