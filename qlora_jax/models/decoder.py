"""One decoder for every family: embedding, scanned segments of layers, a norm, and an output head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.config.pieces import FORWARD, Pieces
from qlora_jax.kernels.experts.router import Balance
from qlora_jax.models.blocks.block import below
from qlora_jax.models.blocks.context import Context, document_lengths, document_starts
from qlora_jax.models.blocks.embedding import Embedding
from qlora_jax.models.blocks.layer import Layer
from qlora_jax.models.blocks.linear import Frozen, Linear
from qlora_jax.models.blocks.norm import RMSNorm, normal
from qlora_jax.models.blocks.per_layer import LayerInputs
from qlora_jax.models.cache import Cache, fresh_key_values
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.rope import rope_tables
from qlora_jax.models.scan import BALANCE, Unit, run_segment
from qlora_jax.models.segments import segments, stacks
from qlora_jax.models.table import table


class Decoder(nnx.Module):
    """A causal language model.

    Args:
      config: its geometry.
      values: every parameter of `table(config)` by path; those of the layers stacked `[L, …]`. Matrices may be packed.
      kind: the Flax variable type of the base weights: `Frozen`, or `nnx.Param` where they are trained themselves.
    """

    def __init__(self, config: ModelConfig, values: Mapping[str, Any], kind: type[nnx.Variable] = Frozen):
        missing = table(config).keys() ^ values.keys()
        if missing:
            raise ValueError(
                f"a {config.family} decoder's values must be table(config)'s; differing: {sorted(missing)}"
            )
        self.config = config
        self.embed_tokens = Embedding(values["embed_tokens.weight"], kind=kind)
        for stack in stacks(config):
            setattr(self, stack.name, Layer(config, stack.kind, below(values, stack.name), kind))
        own = config.per_layer
        self.per_layer = LayerInputs(own, config, below(values, "per_layer"), kind) if own else None
        self.norm = RMSNorm(values["norm.weight"], config.final_norm or config.norm, kind=kind)
        self.lm_head = None if config.tie_embeddings else Linear(values["lm_head.weight"], kind=kind)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        *,
        embedded: Float[Array, "B T D"] | None = None,
        pieces: Pieces = FORWARD,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalised hidden states.

        Args:
          tokens: int32 ids.
          positions: each token's place in its document; 0, 1, 2, … where None.
          segments: which document of its row a token belongs to; all one where None. No attention crosses documents.
            The tokens of a document stand side by side.
          embedded: the tokens' rows of the embedding, where it is a HostTable; looked up here where None.
          pieces: what the backward pass computes again (`remat`, of REMAT_POLICIES or "none"), and how many tokens go
            through an MLP at once.
          key: turns adapter dropout on.
        """
        return self.hidden_and_balance(tokens, positions, segments, embedded=embedded, pieces=pieces, key=key)[0]

    def hidden_and_balance(
        self, tokens: Int[Array, "B T"], positions=None, segments=None, *, embedded=None, pieces=FORWARD, key=None
    ) -> tuple[Float[Array, "B T D"], Balance | None]:
        """As `hidden`, and the sums of the experts' load-balancing loss; None where the configuration has no such loss.

        Tokens of segment 0, which is padding, do not count in these.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        ropes = self._ropes(positions, document_lengths(positions, segments))
        counted = segments > 0 if self.config.balance else None
        context = Context(positions, ropes, document_starts(segments), 0, counted=counted)
        rows = self._rows(tokens) if embedded is None else embedded
        kept: dict[str, Any] = dict(fresh_key_values(self.config, tokens.shape, rows.dtype))
        if self.config.balance:
            kept[BALANCE] = Balance.zero(self.config.experts)
        x, kept = self._run(tokens, rows, context, kept, pieces, key)
        return x, kept.get(BALANCE)

    def step(
        self,
        tokens: Int[Array, "b T"],
        cache: Cache,
        counts: Int[Array, " B"] | Int[Array, ""] | None = None,
        row: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b T D"], Cache]:
        """Appends tokens to a cache and returns their normalised hidden states.

        Args:
          counts: how many of the tokens count in each row, or in every one, all where None. Padding stands after them;
            the row's next tokens take its place.
          row: the only row of the cache that `tokens [1, T]` are for, then with one length for each row in the cache;
            None where there are tokens for each.
        """
        start = cache.length if row is None else cache.length[row]
        positions = jnp.reshape(start, (-1, 1)) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, tokens.shape)
        length = start + (tokens.shape[1] if counts is None else counts)
        ropes = self._ropes(positions, jnp.reshape(length, (-1, 1)))
        context = Context(positions, ropes, jnp.zeros_like(tokens), start, counts, row)
        x, layers = self._run(tokens, self._rows(tokens), context, cache.layers)
        return x, Cache(layers, length if row is None else cache.length.at[row].set(jnp.reshape(length, ())))

    def untie(self) -> None:
        """Gives a tied decoder an output layer of its own, of the same table, for what changes only one of them."""
        self.config = dataclasses.replace(self.config, tie_embeddings=False)
        self.lm_head = nnx.data(self.head)

    @property
    def head(self) -> Linear:
        """The output layer; where the embedding is tied, a layer whose weight is its table."""
        if self.lm_head is not None:
            return self.lm_head
        return Linear(self.embed_tokens.weight.get_value(), kind=type(self.embed_tokens.weight))

    def logits(self, hidden: Float[Array, "*B D"], start=0, size: int | None = None) -> Float[Array, "*B V"]:
        """float32 scores of every token of the vocabulary, or of `size` tokens from `start` on, which may be traced.

        Raises:
          ValueError: a part of a head in NF4 whose rows are no multiple of 64 elements.
        """
        with jax.named_scope("lm_head"):
            head = self.head if size is None else self.head.outputs(start, size)
            logits = head(hidden).astype(jnp.float32)
        factor, cap = self.config.logit_multiplier, self.config.logit_soft_cap
        logits = logits if factor == 1.0 else logits * factor
        return cap * jnp.tanh(logits / cap) if cap else logits

    def __call__(self, tokens: Int[Array, "B T"], positions=None, segments=None) -> Float[Array, "B T V"]:
        """float32 logits of every position."""
        return self.logits(self.hidden(tokens, positions, segments))

    def _rows(self, tokens):
        with jax.named_scope("embedding"):
            return self.embed_tokens(tokens)

    def _embed(self, rows):
        """x of the tokens' rows of the embedding."""
        if self.config.embedding_multiplier != 1.0:
            # As transformers does, the factor is rounded to the dtype of the rows.
            rows *= jnp.asarray(self.config.embedding_multiplier, rows.dtype)
        return normal(rows, self.config.norm.eps).astype(rows.dtype) if self.config.embedding_norm else rows

    def _ropes(self, positions, lengths):
        found = {layer.rope: None for layer in self.config.layers if layer.rope is not None}
        return {rope: rope_tables(rope, positions, lengths) for rope in found}

    def _run(self, tokens, rows, context: Context, caches: Mapping[str, Any], pieces: Pieces = FORWARD, key=None):
        """The normalised x after all layers, and the caches of the stacks by name with these tokens in them."""
        keys = None if key is None else jax.random.split(key, self.config.num_layers)
        x = self._embed(rows)
        extra = None if self.per_layer is None else self.per_layer(tokens, x, key)
        for segment in segments(self.config):
            x, caches = run_segment(Unit(self, segment, context, pieces), x, caches, extra, keys)
        return self.norm(x), caches
