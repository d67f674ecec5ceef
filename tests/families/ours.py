"""What the package makes of a family's checkpoint; compiled once for each kind of model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.io.hf import LoadedModel, load_model
from qlora_jax.io.peft import attach_adapter, read_adapter
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.decoder import Decoder
from qlora_jax.quant.rules import AS_HELD, Rules
from tests.families.checkpoints import DOCUMENTS, LENGTH, STEPS, Reference

CLOSE = 1e-4


def load(folder: Path, *, adapter: Path | None = None, dtype: str = "float32", rules: Rules = AS_HELD) -> LoadedModel:
    """A checkpoint's model, with an adapter on it or without."""
    loaded = load_model(folder, dtype=dtype, rules=rules)
    if adapter is not None:
        attach_adapter(loaded.model, read_adapter(adapter), base_hash=loaded.content_hash)
    return loaded


def logits(model: Decoder, reference: Reference) -> np.ndarray:
    """float32 `[3, 48, V]`: of both texts, and of a row that both documents fill."""
    documents = [row[:length] for row, length in zip(reference.tokens, DOCUMENTS, strict=True)]
    tokens = np.stack([*reference.tokens, np.concatenate(documents)])
    places = np.arange(LENGTH)
    positions = np.stack([places, places, np.concatenate([np.arange(length) for length in DOCUMENTS])])
    segments = np.stack([np.ones(LENGTH), np.ones(LENGTH), np.repeat([1, 2], DOCUMENTS)])
    return np.asarray(_scored(*nnx.split(model), *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))))


@functools.partial(jax.jit, static_argnums=0)
def _scored(graph, state, tokens, positions, segments):
    return nnx.merge(graph, state)(tokens, positions, segments)


def continued(model: Decoder, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[B, 2 * STEPS, V]` of the last tokens and of a greedy continuation, and the latter, through a cache."""
    found, chosen = _continued(*nnx.split(model), jnp.asarray(reference.tokens, jnp.int32))
    return np.asarray(found), np.asarray(chosen)


@functools.partial(jax.jit, static_argnums=0)
def _continued(graph, state, tokens):
    model = nnx.merge(graph, state)
    cache = empty_cache(model.config, tokens.shape[0], LENGTH + STEPS, jnp.float32)
    _, cache = model.step(tokens[:, :-STEPS], cache)

    def one(carry, given):
        cache, best = carry
        own = jnp.where(given < 0, best, given)
        hidden, cache = model.step(own[:, None], cache)
        logits = model.logits(hidden[:, 0])
        return (cache, logits.argmax(-1).astype(jnp.int32)), (logits, own)

    given = jnp.concatenate([tokens[:, -STEPS:], jnp.full_like(tokens[:, :STEPS], -1)], axis=1)
    logits, fed = jax.lax.scan(one, (cache, tokens[:, 0]), given.T)[1]
    return logits.swapaxes(0, 1), fed[STEPS:].T


def off(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def apart(actual: np.ndarray, expected: np.ndarray, share: float) -> float:
    """How far tokens' logits are from each other, as a share of their size: the furthest of the nearest `share`."""
    return float(np.quantile(np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1), share))
