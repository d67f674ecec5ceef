"""The device's side of the engine: base, stacked adapters and cache, and the few programs that run over them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.experts import ExpertAdapterStack
from qlora_jax.lora.low_rank import stack_pairs
from qlora_jax.lora.rows import AdapterStack
from qlora_jax.models.adapters import shape_of
from qlora_jax.models.cache import can_be_cut, empty_cache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Param
from qlora_jax.models.table import adaptable
from qlora_jax.serve import programs
from qlora_jax.serve.memory import check_room, needs_of
from qlora_jax.serve.programs import SCORED_AT_ONCE, Drawn, PromptPiece, Rows, Scores
from qlora_jax.serve.sizes import Base

SMALLEST_PIECE = SCORED_AT_ONCE
# The longest piece of a prompt that is read at once; other requests' tokens come between the pieces.
LONGEST_PIECE = 512


class Weights(NamedTuple):
    """One linear layer's adapter in host memory: A `[L, r, K]`, B `[L, N, r]` and scale, float32 `[L]`.

    Of experts A `[L, E, r, K]` and B `[L, E, N, r]`. L is 1 for what stands outside the layers.
    """

    A: Any
    B: Any
    scale: Any


class Piece(NamedTuple):
    """Part of a prompt: tokens from `start` to before `end`, in a program for `size`."""

    start: int
    end: int
    size: int


class Programs:
    """The programs of a model, jitted. What they have compiled serves every engine of this model in the process.

    Attributes:
      compiled: how often one of them has been traced, which is how many have been compiled.
    """

    def __init__(self, graphdef: nnx.GraphDef):
        self.compiled = 0
        self.decode = self._jit(functools.partial(programs.decode, graphdef), donated=(2,))
        self.prefill = self._jit(functools.partial(programs.prefill, graphdef), donated=(2,))
        self.install = self._jit(programs.install, donated=(0,))
        self.clear = self._jit(programs.clear, donated=(0,))

    @classmethod
    @functools.lru_cache(maxsize=4)
    def of(cls, graphdef: nnx.GraphDef) -> "Programs":
        """Those of a model's structure."""
        return cls(graphdef)

    def _jit(self, function: Callable, donated: tuple[int, ...]) -> Callable:
        def counted(*arguments):
            self.compiled += 1
            return function(*arguments)

        return jax.jit(counted, donate_argnums=donated)


class Runner:
    """Runs an engine's programs. Not thread-safe.

    Args:
      base: the model.
      rows: texts that are served at once.
      max_length: tokens of the longest text.
      slots: adapters that the device holds at once.
      rank: the largest rank of an adapter.
      expert_rank: the same on experts; 0 where these take none.

    Attributes:
      needs: what all this takes of the device's memory.
      cuts: whether what a row holds can be cut back to its first tokens; else it is kept whole or not at all.

    Raises:
      ValueError: more than the device has.
    """

    def __init__(self, base: Base, *, rows: int, max_length: int, slots: int, rank: int, expert_rank: int = 0):
        self.config, self.rows, self.slots = base.config, rows, slots
        self._served = served(base.config, rank, expert_rank)
        # A piece is written whole, padding too: the smallest fits after any text that is not complete.
        self.length = -(-max_length // SMALLEST_PIECE) * SMALLEST_PIECE + SMALLEST_PIECE
        longest = min(LONGEST_PIECE, 1 << (max_length - 1).bit_length())
        self.sizes = [size for size in powers(SMALLEST_PIECE, LONGEST_PIECE) if size <= max(longest, SMALLEST_PIECE)]
        self.base, self.cuts = base.state, can_be_cut(base.config)
        self._programs = Programs.of(base.graphdef)
        self._compiled_before = self._programs.compiled
        self.dtype = nnx.merge(base.graphdef, *self.base).embed_tokens.weight.get_value().dtype
        self.needs = needs_of(self.base, *jax.eval_shape(self._empty))
        check_room(self.needs)
        self.reset()

    @property
    def compiled(self) -> int:
        """How many programs have been compiled since the start."""
        return self._programs.compiled - self._compiled_before

    def reset(self) -> None:
        """Empty cache and no adapters, as at the start, or after a program has failed and taken its arguments along."""
        # Placed by name, as what the programs give is: JAX compiles anew for arrays that are not.
        start = *self._empty(), jnp.zeros(self.rows, jnp.int32)
        self.texts, self.stacks, self._drawn = jax.device_put(start, jax.local_devices()[0])

    def _empty(self) -> tuple[dict[str, Any], dict[str, AdapterStack | ExpertAdapterStack]]:
        """The cache of no text, and stacks without adapters."""
        cache = empty_cache(self.config, self.rows, self.length, self.dtype)
        return cache.layers, empty_stacks(self._served, self.slots + 1, self.dtype)

    def warm_up(self) -> None:
        """Compiles every program that serving will need, and leaves no trace in the cache's rows or the stacks."""
        for size in self.sizes:
            self.prefill(0, np.zeros(1, np.int32), Piece(0, 1, size), idle_rows(1, 0), scored=False)
        self.decode(idle_rows(self.rows, self.length))
        ranks = {path: padded_ranks(most) for path, (_, most) in self._served.items()}
        for rank in sorted(set().union(*ranks.values())):
            fitting = [path for path, own in ranks.items() if rank in own]
            self.install(0, {path: self._no_weights(path, rank) for path in fitting})
        self.clear(0)

    def pieces(self, start: int, end: int) -> list[Piece]:
        """How a prompt's tokens from `start` on are read: as few pieces as fit into the row."""
        found = []
        while start < end:
            fitting = [size for size in self.sizes if start + size <= self.length]
            size = next((size for size in fitting if size >= end - start), fitting[-1])
            found.append(Piece(start, min(start + size, end), size))
            start = found[-1].end
        return found

    def prefill(self, row: int, prompt: np.ndarray, piece: Piece, rows: Rows, *, scored: bool) -> tuple[Drawn, Scores]:
        """Starts to read a piece of a prompt into a row: gives the token after it, and the piece's scores if asked for.

        As with `decode`, the arrays may still be on their way: `fetch` waits for them.
        """
        tokens = padded(prompt[piece.start : piece.end], piece.size)[None]
        targets = padded(prompt[piece.start + 1 : piece.end + 1], piece.size)
        length = np.int32(piece.end - piece.start)
        read: list[Any] = [np.int32(row), tokens, length, rows, targets, np.bool_(scored)]
        arguments = self.base, self.stacks, self.texts, PromptPiece(*read)
        self.texts, drawn, scores = self._programs.prefill(*arguments)
        return drawn, scores

    def decode(self, rows: Rows) -> Drawn:
        """Starts to read every row's last token and gives the next."""
        self.texts, drawn = self._programs.decode(self.base, self.stacks, self.texts, self._drawn, rows)
        self._drawn = drawn.tokens
        return drawn

    def install(self, slot: int, adapter: Mapping[str, Weights]) -> None:
        """Puts an adapter into a slot of the stacks; layers that it lacks get zeros."""
        for path, stack in self.stacks.items():
            weights = adapter.get(path) or self._no_weights(path, 0)
            A, B, scale = jax.device_put(weights, jax.local_devices()[0])
            self.stacks[path] = self._programs.install(stack, np.int32(slot), A, B, scale)

    def _no_weights(self, path: str, rank: int) -> Weights:
        param, _ = self._served[path]
        layers = max(len(param.layers), 1)
        parts = stack_pairs([None] * layers, shape_of(param, rank), self.dtype)
        return Weights(*parts, np.zeros(layers, np.float32))

    def clear(self, row: int) -> None:
        """Empties a row of the cache."""
        self.texts = self._programs.clear(self.texts, np.int32(row))


def fetch(arrays: Any) -> Any:
    """Arrays of the device in host memory, once they are there."""
    return jax.device_get(arrays)


def padded(ids: np.ndarray, size: int) -> np.ndarray:
    """The ids and zeros after them."""
    return np.pad(ids, (0, size - len(ids)))


def powers(first: int, last: int) -> list[int]:
    """first, 2 · first, 4 · first, … up to the first that is at least `last`; `last` itself in its place."""
    found = [first]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found


def served(config: ModelConfig, rank: int, expert_rank: int) -> dict[str, tuple[Param, int]]:
    """What takes adapters when served, by path, and the largest rank there: all linear layers but the output layer.

    Experts only where `expert_rank` is not 0: their adapters are large, and every slot takes the memory of one.
    """
    params = {path: param for path, param in adaptable(config).items() if param.role != "head"}
    limits = {path: expert_rank if param.experts else rank for path, param in params.items()}
    return {path: (param, limits[path]) for path, param in params.items() if limits[path]}


def padded_ranks(limit: int) -> list[int]:
    """The ranks that adapters are padded to. Few: each is a program of its own that puts an adapter into the stacks."""
    return [0, *powers(min(8, limit), limit)]


def empty_stacks(
    places: Mapping[str, tuple[Param, int]], slots: int, dtype
) -> dict[str, AdapterStack | ExpertAdapterStack]:
    """Stacks without adapters for what `served` gave."""

    def stack(param: Param, rank: int) -> AdapterStack | ExpertAdapterStack:
        n, k = param.shape
        leading = (max(len(param.layers), 1), slots)
        own = (*leading, param.experts) if param.experts else leading
        A, B = jnp.zeros((*own, rank, k), dtype), jnp.zeros((*own, n, rank), dtype)
        return (ExpertAdapterStack if param.experts else AdapterStack)(A, B, jnp.zeros(leading, jnp.float32))

    return {path: stack(*place) for path, place in places.items()}


def idle_rows(rows: int, length: int) -> Rows:
    """The inputs of rows that do nothing: a full row takes no more keys and values, no token comes into its state."""

    def filled(value, dtype: Any = np.int32, shape: tuple[int, ...] = (rows,)) -> Any:
        return np.full(shape, value, dtype)

    return Rows(
        tokens=filled(0),
        lengths=filled(length),
        counts=filled(0),
        slots=filled(0),
        sampling=programs.RowSampling(filled(0, np.float32), filled(0), filled(1, np.float32)),
        seeds=filled(0, np.uint32, (rows, 2)),
        drawn=filled(0),
        scored=filled(False, bool),
    )
