"""The device's side of the engine: base, stacked adapters and cache, and the few programs that run over them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.rows import AdapterStack
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import Param, adaptable
from qlora_jax.serve import programs
from qlora_jax.serve.memory import check_room, needs_of
from qlora_jax.serve.programs import SCORED_AT_ONCE, Drawn, PromptPiece, Rows, Scores
from qlora_jax.serve.sizes import Base

SMALLEST_PIECE = SCORED_AT_ONCE
# The longest piece of a prompt that is read at once; other requests' tokens come between the pieces.
LONGEST_PIECE = 512


class Weights(NamedTuple):
    """One linear layer's adapter in host memory: A `[L, r, K]`, B `[L, N, r]` and scale, float32 `[L]`."""

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

    Attributes:
      needs: what all this takes of the device's memory.

    Raises:
      ValueError: more than the device has.
    """

    def __init__(self, base: Base, *, rows: int, max_length: int, slots: int, rank: int):
        self.config, self.rows, self.slots, self.rank = base.config, rows, slots, rank
        # A piece is written whole, padding too: the smallest fits after any text that is not complete.
        self.length = -(-max_length // SMALLEST_PIECE) * SMALLEST_PIECE + SMALLEST_PIECE
        longest = min(LONGEST_PIECE, 1 << (max_length - 1).bit_length())
        self.sizes = [size for size in powers(SMALLEST_PIECE, LONGEST_PIECE) if size <= max(longest, SMALLEST_PIECE)]
        self.ranks = [0, *powers(min(8, rank), rank)]
        self.base = base.state
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

    def _empty(self) -> tuple[dict[str, Any], dict[str, AdapterStack]]:
        """Keys and values of no text, and stacks without adapters."""
        cache = empty_cache(self.config, self.rows, self.length, self.dtype)
        return cache.layers, empty_stacks(self.config, self.slots + 1, self.rank, self.dtype)

    def warm_up(self) -> None:
        """Compiles every program that serving will need, and leaves no trace in the cache's rows or the stacks."""
        for size in self.sizes:
            self.prefill(0, np.zeros(1, np.int32), Piece(0, 1, size), idle_rows(1, 0), scored=False)
        self.decode(idle_rows(self.rows, self.length))
        for rank in self.ranks:
            self.install(0, {path: no_weights(self.config, path, rank, self.dtype) for path in self.stacks})
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
            weights = adapter.get(path) or no_weights(self.config, path, 0, self.dtype)
            A, B, scale = jax.device_put(weights, jax.local_devices()[0])
            self.stacks[path] = self._programs.install(stack, np.int32(slot), A, B, scale)

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


def served(config: ModelConfig) -> dict[str, Param]:
    """Every linear layer that takes adapters when served, by path: the decoder's projections."""
    return {module: param for module, param in adaptable(config).items() if param.projection}


def empty_stacks(config: ModelConfig, slots: int, rank: int, dtype) -> dict[str, AdapterStack]:
    """Stacks of zeros for every linear layer of the decoder."""

    def stack(param: Param) -> AdapterStack:
        (layers,), (n, k) = param.leading, param.shape
        A, B = jnp.zeros((layers, slots, rank, k), dtype), jnp.zeros((layers, slots, n, rank), dtype)
        return AdapterStack(A, B, jnp.zeros((layers, slots), jnp.float32))

    return {path: stack(param) for path, param in served(config).items()}


def no_weights(config: ModelConfig, path: str, rank: int, dtype) -> Weights:
    """An adapter of zeros for one linear layer."""
    (layers,), (n, k) = served(config)[path].leading, served(config)[path].shape
    return Weights(np.zeros((layers, rank, k), dtype), np.zeros((layers, n, rank), dtype), np.zeros(layers, np.float32))


def idle_rows(rows: int, length: int) -> Rows:
    """The inputs of rows that do nothing: a full row takes no more tokens."""

    def filled(value, dtype: Any = np.int32, shape: tuple[int, ...] = (rows,)) -> Any:
        return np.full(shape, value, dtype)

    return Rows(
        tokens=filled(0),
        lengths=filled(length),
        slots=filled(0),
        sampling=programs.RowSampling(filled(0, np.float32), filled(0), filled(1, np.float32)),
        seeds=filled(0, np.uint32, (rows, 2)),
        drawn=filled(0),
        scored=filled(False, bool),
    )
