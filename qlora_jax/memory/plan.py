"""What a train step needs on the device, by arithmetic on shapes: no GPU, no compiler, a second or two.

What lies there between steps is counted from the very shapes that the step is compiled with, so it is exact. What the
backward pass keeps is counted from JAX's own trace of it. Only the working memory inside one layer and inside the loss
is a formula; its coefficients were fitted to XLA's buffer assignment, and tests hold the sum to 10 % of the compiler's.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from qlora_jax.config import Config, DataSection, OptimSection, Pieces, TrainSection
from qlora_jax.device.facts import nbytes, tree_bytes
from qlora_jax.memory.train_step import AbstractState, abstract_batch, abstract_state, dropout_key
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.models.segments import segments, stacks
from qlora_jax.models.specs import LayerKind
from qlora_jax.objective import hidden_states
from qlora_jax.quant.host_table import host_table
from qlora_jax.quant.packed import is_packed
from qlora_jax.training.gradients import needs_own_buffers
from qlora_jax.training.offload import HostState

# How many rows of a token are alive at once in a layer's backward pass, in the computation's dtype: as wide as the
# hidden state, as the MLP, as the queries, as the keys. Fitted to 7B and 8B at 128 to 16,384 tokens and 1 to 16 rows.
HIDDEN_ROWS, MLP_ROWS, QUERY_ROWS, KEY_ROWS = 4, 6, 8, 3
# As wide as the hidden state, for each further layer of the unit that a scan runs. Fitted to Qwen3.5-9B and LFM2-2.6B.
UNIT_ROWS = 3
# Chunks of float32 logits alive at once: scores, their exponentials, and two 16-bit copies of the gradient.
LOGITS_COPIES = 3
# Weights of the MLP's size alive at once in a layer: unpacked by a kernel, or copied out of a 16-bit stack by the scan.
UNPACKED_WEIGHTS, SLICED_WEIGHTS = 1, 2
# A layer's adapters in 16 bits and their gradients.
ADAPTER_COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Bytes on the device during one train step.

    Attributes:
      codes, scales: of the weights in 4 or 8 bits, whichever they are.
      weights: projections in 16 or 32 bits, and biases.
      embeddings: token embedding and output layer, where they are not packed.
      norms: of the layers and the last one.
      adapters: A, B and their scales.
      optimizer: its state. batch: the tokens of one optimizer step, their rows where the embedding is in host memory,
        and the dropout key.
      gradients: one buffer, to which all microbatches add; two where a head is trained in slices.
      activations: what the forward pass keeps for the backward pass.
      layer: working memory in the backward pass of one layer. logits: working memory of the loss.
      host: what lies in the host's memory, of activations, optimizer's state and embedding; no part of the peak.
    """

    codes: int = 0
    scales: int = 0
    weights: int = 0
    embeddings: int = 0
    norms: int = 0
    adapters: int = 0
    optimizer: int = 0
    batch: int = 0
    gradients: int = 0
    activations: int = 0
    layer: int = 0
    logits: int = 0
    host: int = 0

    @property
    def base(self) -> int:
        """The model's weights, as they are stored."""
        return self.codes + self.scales + self.weights + self.embeddings + self.norms

    @property
    def arguments(self) -> int:
        """What is there between steps: exactly the compiled step's `arguments`."""
        return self.base + self.adapters + self.optimizer + self.batch

    @property
    def largest_temporary(self) -> int:
        """Working memory at the peak: of a layer or of the loss, which do not come at the same time."""
        return max(self.layer, self.logits)

    @property
    def peak(self) -> int:
        return self.arguments + self.gradients + self.activations + self.largest_temporary

    def parts(self) -> dict[str, int]:
        """Parts that add up to the peak, by name."""
        parts = dataclasses.asdict(self)
        del parts["layer"], parts["logits"], parts["host"]
        return {**parts, "largest_temporary": self.largest_temporary}


def plan(config: Config, model_config: ModelConfig) -> Breakdown:
    """The bytes of one train step of `config` on a model of this geometry.

    Raises:
      ValueError: an adapter target that matches nothing.
    """
    return Planner(config, model_config).at(config.train.batch_size, config.train.seq_len)


class Residuals(NamedTuple):
    """Bytes kept for the backward pass beside what is there anyway.

    Attributes:
      in_layers: on the device for every layer. after_layers: for the last norm, gone before the layers' turn.
      on_host: in the host's memory.
    """

    in_layers: int
    after_layers: int
    on_host: int


# A trace takes a third of a second, and advice on one configuration asks for dozens.
_TRACED: dict[str, Residuals] = {}


class Planner:
    """`plan` for several batches and lengths of one configuration: what does not depend on them is counted once."""

    def __init__(self, config: Config, model_config: ModelConfig):
        self.config, self.model_config = config, model_config
        self.itemsize = np.dtype(DTYPES[config.model.dtype]).itemsize
        self._state = abstract_state(config, model_config)
        self._fixed = _fixed(self._state)
        paged = isinstance(self._state.opt_state, HostState)
        table = host_table(self._state.parts.base)
        moments = sum(nbytes(leaf) for leaf in jax.tree.leaves(self._state.opt_state) if paged and leaf.ndim)
        self._on_host = moments + (0 if table is None else table.nbytes)

    def at(self, batch_size: int, seq_len: int) -> Breakdown:
        """The breakdown with these in place of the configuration's own `train.batch_size` and `train.seq_len`."""
        config = self._resized(batch_size, seq_len)
        kept = self._row_residuals(seq_len)
        return Breakdown(
            **self._fixed,
            batch=tree_bytes((abstract_batch(config, self._state.parts.base), dropout_key(config))),
            gradients=self._gradients(),
            activations=batch_size * kept.in_layers,
            layer=self._layer(batch_size, seq_len),
            logits=self._logits(batch_size * seq_len) + batch_size * kept.after_layers,
            host=batch_size * kept.on_host + self._on_host,
        )

    def _gradients(self) -> int:
        narrowed, trained = self.config.optim.gradients == "bf16", self._state.parts.trained
        buffers = 2 if needs_own_buffers(trained, self.config.train) else 1
        return buffers * sum(leaf.size * (2 if narrowed else leaf.dtype.itemsize) for leaf in jax.tree.leaves(trained))

    def _resized(self, batch_size: int, seq_len: int) -> Config:
        section = dataclasses.replace(self.config.train, batch_size=batch_size, seq_len=seq_len)
        return dataclasses.replace(self.config, train=section)

    def _row_residuals(self, seq_len: int) -> Residuals:
        """The residuals of one row, traced once for all configurations that do not differ in it."""
        one_row = TrainSection(batch_size=1, grad_accum=1, seq_len=seq_len)
        config = dataclasses.replace(
            self.config, train=one_row, optim=OptimSection(), data=DataSection(), seed=0, output_dir=""
        )
        pieces = self.config.train.of_layers()
        key = repr((config, pieces, self.model_config))
        if key not in _TRACED:
            _TRACED[key] = trace_residuals(config, pieces, self._state, self.model_config)
        return _TRACED[key]

    def _layer(self, rows: int, seq_len: int) -> int:
        """Working memory of one layer's backward pass: in the MLP or in the attention, whichever is more."""
        one = self.model_config
        working = max(self._working(kind, rows, seq_len) for kind in set(one.kinds))
        hidden = HIDDEN_ROWS + UNIT_ROWS * (max(map(len, segments(one))) - 1)
        adapters = ADAPTER_COPIES * self._fixed.get("adapters", 0) // one.num_layers
        return (rows * seq_len * hidden * one.hidden_size + working) * self.itemsize + adapters

    def _working(self, kind: LayerKind, rows: int, seq_len: int) -> int:
        """Elements that a layer's mixer or its feed-forward block needs at once, whichever needs more."""
        copies = UNPACKED_WEIGHTS if self.config.method == "qlora" else SLICED_WEIGHTS
        width, (queries, keys), inner = self.model_config.hidden_size, kind.mixer.widths, kind.feed_forward.width
        through_mlp = self.config.train.mlp_tokens(seq_len)
        mlp = rows * through_mlp * MLP_ROWS * inner + copies * inner * width
        attention = rows * seq_len * (QUERY_ROWS * queries + KEY_ROWS * keys) + copies * queries * width
        return max(mlp, attention)

    def _logits(self, tokens: int) -> int:
        """Working memory of the loss: one chunk's logits, or fewer of them and the output layer unpacked for them.

        Of both only the part for one slice of the vocabulary.
        """
        slices = self.config.train.vocab_slices(self.model_config.vocab_size)
        columns = slices.size if slices else self.model_config.vocab_size
        chunk = 4 * columns * self.config.train.loss_tokens(tokens)
        unpacked = columns * self.model_config.hidden_size * self.itemsize
        head = self._state.parts.base.get("embed_tokens" if self.model_config.tie_embeddings else "lm_head", {})
        packed = any(map(is_packed, jax.tree.leaves(head, is_leaf=is_packed)))
        return max(LOGITS_COPIES * chunk, chunk + unpacked if packed else 0)


def _fixed(state: AbstractState) -> dict[str, int]:
    """Bytes of base, adapters and optimizer, by the names of Breakdown."""
    # Of a paged state only counters, a few bytes, are on the device, and not while gradients are computed.
    optimizer = 0 if isinstance(state.opt_state, HostState) else tree_bytes(state.opt_state)
    sums: collections.Counter[str] = collections.Counter(optimizer=optimizer)
    leaves = jax.tree_util.tree_leaves_with_path((state.parts.trained, state.parts.base), is_leaf=is_packed)
    for path, leaf in leaves:
        if is_packed(leaf):
            sums["codes"] += leaf.code_bytes
            sums["scales"] += leaf.nbytes - leaf.code_bytes
        else:
            sums[_kind(jax.tree_util.keystr(path))] += nbytes(leaf)
    return dict(sums)


def _kind(path: str) -> str:
    if "'lora'" in path:
        return "adapters"
    if "embed_tokens" in path or "lm_head" in path:
        return "embeddings"
    return "norms" if "norm" in path else "weights"


def trace_residuals(config: Config, pieces: Pieces, state: AbstractState, model: ModelConfig) -> Residuals:
    """What JAX hands from the forward to the backward pass of one microbatch, by its own trace of them."""
    parts = state.parts
    microbatch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), abstract_batch(config, parts.base))

    def backward(trained, base, batch, key):
        def hidden(trained):
            return hidden_states(nnx.merge(parts.graphdef, trained, base), batch, pieces, key)

        return jax.vjp(hidden, trained)[1]

    inputs = (parts.trained, parts.base, microbatch, dropout_key(config))
    # The avals of a jaxpr say in which memory an array lies; eval_shape does not.
    kept = _counted(jax.make_jaxpr(backward)(*inputs).out_avals) - _counted(jax.tree.leaves(inputs))
    device = {leaf: count for leaf, count in kept.items() if not leaf.on_host}
    # A scan stacks what its layers keep; one of a single layer is told by the axis of the only row behind.
    begins = {(len(stack.layers),) if len(stack.layers) > 1 else (1, 1) for stack in stacks(model)}
    stacked = {leaf: count for leaf, count in device.items() if any(leaf.shape[: len(b)] == b for b in begins)}
    return Residuals(_sum(stacked), _sum(device) - _sum(stacked), _sum(kept) - _sum(device))


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    on_host: bool


def _counted(leaves: Iterable[Any]) -> collections.Counter[_Leaf]:
    """How many arrays there are of each shape, dtype and memory."""
    host = jax.memory.Space.Host
    return collections.Counter(_Leaf(x.shape, x.dtype, getattr(x, "memory_space", None) == host) for x in leaves)


def _sum(counts: Mapping[_Leaf, int]) -> int:
    return sum(count * nbytes(leaf) for leaf, count in counts.items())
