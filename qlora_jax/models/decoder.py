"""One decoder for every dense family: embedding, a scanned stack of layers, a norm, and an output head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.lora.rows import RowAdapters
from qlora_jax.models.blocks.attention import Attention, Context, document_lengths, document_starts
from qlora_jax.models.blocks.layers import MLP, Embedding, Frozen, Linear, RMSNorm, subkey
from qlora_jax.models.cache import Cache, LayerCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.rope import rope_tables
from qlora_jax.models.table import STACK, parameter_specs
from qlora_jax.quant.mixed import MixedLayer, MixedStack
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor

LAYER_INPUT = "layer_input"
# What the backward pass finds stored instead of computing it again; each layer's input is always stored: on the device,
# or, by "offload", in the host's memory.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Built from `[L, …]` stacks; a scan hands it one layer's slice."""

    def __init__(self, config: ModelConfig, values: Mapping[str, Any], kind):
        def linear(name):
            return Linear(values[f"{name}.weight"], values.get(f"{name}.bias"), kind=kind)

        def norm(name):
            weight = values.get(f"{name}.weight")
            return None if weight is None else RMSNorm(weight, eps=config.norm_eps, kind=kind)

        q, k, v, o = (linear(f"self_attn.{p}_proj") for p in "qkvo")
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, q, k, v, o, norm("self_attn.q_norm"), norm("self_attn.k_norm"))
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = MLP(*(linear(f"mlp.{p}_proj") for p in ("gate", "up", "down")))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        window,
        cache: LayerCache | None = None,
        key=None,
        mlp_chunk: int = 0,
    ):
        """Returns the new x and the cache with these tokens in it, None without one."""
        with jax.named_scope("attention"):
            y, cache = self.self_attn(self.input_layernorm(x), context, window, cache, subkey(key, "attention"))
            x += y
        with jax.named_scope("mlp"):
            return x + in_chunks(self._mlp, x, subkey(key, "mlp"), mlp_chunk), cache

    def _mlp(self, x: Float[Array, "B T D"], key) -> Float[Array, "B T D"]:
        return self.mlp(self.post_attention_layernorm(x), key)


class Decoder(nnx.Module):
    """A causal language model.

    Args:
      config: its geometry.
      values: every parameter of `parameter_specs(config)` by path; those of the layers stacked `[L, …]`. Decoder
        projections may be NF4Tensors or MixedStacks, the embedding and an untied output layer NF4Tensors or
        Int8Tensors.
      kind: the Flax variable type of the base weights: `Frozen`, or `nnx.Param` where they are trained themselves.
    """

    def __init__(self, config: ModelConfig, values: Mapping[str, Any], kind: type[nnx.Variable] = Frozen):
        missing = parameter_specs(config).keys() ^ values.keys()
        if missing:
            raise ValueError(
                f"a {config.family} decoder's values must be parameter_specs(config)'s; differing: {sorted(missing)}"
            )
        stacked = {path.removeprefix(STACK): value for path, value in values.items() if path.startswith(STACK)}
        self.config = config
        self.embed_tokens = Embedding(values["embed_tokens.weight"], kind=kind)
        self.layers = Layer(config, stacked, kind)
        self.norm = RMSNorm(values["norm.weight"], eps=config.norm_eps, kind=kind)
        self.lm_head = None if config.tie_embeddings else Linear(values["lm_head.weight"], kind=kind)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        *,
        embedded: Float[Array, "B T D"] | None = None,
        remat: str = "none",
        mlp_chunk: int = 0,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalised hidden states.

        Args:
          tokens: int32 ids.
          positions: each token's place in its document; 0, 1, 2, … where None.
          segments: which document of its row a token belongs to; all one where None. No attention crosses documents.
            The tokens of a document stand side by side.
          embedded: the tokens' rows of the embedding, where it is a HostTable; looked up here where None.
          remat: "none", or a key of REMAT_POLICIES.
          mlp_chunk: tokens that go through an MLP at once, 0 for all.
          key: turns adapter dropout on.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        rope = rope_tables(self.config, positions, document_lengths(positions, segments))
        context = Context(rope, document_starts(segments), 0)
        x = self._embed(tokens) if embedded is None else embedded
        return self._run(x, context, None, remat, key, mlp_chunk)[0]

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
        rope = rope_tables(self.config, positions, jnp.reshape(length, (-1, 1)))
        context = Context(rope, jnp.zeros_like(tokens), start)
        x, (k, v) = self._run(self._embed(tokens), context, (cache.k, cache.v), "none", None, row=row)
        return x, Cache(k, v, length if row is None else cache.length.at[row].set(jnp.reshape(length, ())))

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
            return head(hidden).astype(jnp.float32)

    def __call__(self, tokens: Int[Array, "B T"], positions=None, segments=None) -> Float[Array, "B T V"]:
        """float32 logits of every position."""
        return self.logits(self.hidden(tokens, positions, segments))

    def _embed(self, tokens):
        with jax.named_scope("embedding"):
            return self.embed_tokens(tokens)

    def _run(self, x, context: Context, cache, remat: str, key, mlp_chunk: int = 0, row=None):
        graphdef, state = nnx.split(self.layers)
        sliced, layer_at = _sliced(state)
        windows = jnp.asarray(self.config.windows, jnp.int32)
        indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def body(carry, xs):
            (x, stacks), (sliced, index, window, key) = carry, xs
            x = checkpoint_name(x, LAYER_INPUT)
            cache = None if stacks is None else LayerCache(stacks[0], stacks[1], index, row)
            x, cache = nnx.merge(graphdef, layer_at(sliced, index))(x, context, window, cache, key, mlp_chunk)
            return (x, None if cache is None else (cache.k, cache.v)), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        (x, cache), _ = lax.scan(body, (x, cache), (sliced, indices, windows, keys))
        return self.norm(x), cache


def in_chunks(function: Callable, x: Float[Array, "B T D"], key: Array | None, chunk: int) -> Float[Array, "B T D"]:
    """`function(x, key)`, which treats tokens one by one, on `chunk` tokens of each row at a time (0: on all).

    In the backward pass, too, what it computes on the way exists for one chunk only.
    """
    batch, length, size = x.shape
    if chunk == 0 or length <= chunk:
        return function(x, key)
    padded = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, -1, chunk, size), 1, 0)
    keys = None if key is None else jax.random.split(key, len(chunks))
    y = lax.map(jax.checkpoint(lambda xs: function(*xs), prevent_cse=False), (chunks, keys))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, size)[:, :length]


def _sliced(state) -> tuple[list, Callable]:
    """(what a scan shall slice, a function of one slice and its index that gives the layer's state).

    A scan copies the slices of what it runs over. Packed weights, nearly all of a base, and adapters that are served
    side by side stay whole: a layer of theirs is read where it lies (NF4Layer, MixedLayer, RowAdapters).
    """
    leaves, structure = jax.tree.flatten(state, is_leaf=_stays_whole)

    def layer_at(slices: list, index):
        rest = iter(slices)
        values = [_by_reference(leaf, index) if _stays_whole(leaf) else next(rest) for leaf in leaves]
        return jax.tree.unflatten(structure, values)

    return [leaf for leaf in leaves if not _stays_whole(leaf)], layer_at


def _stays_whole(leaf) -> bool:
    return isinstance(leaf, NF4Tensor | MixedStack | RowAdapters)


def _by_reference(leaf, index):
    if isinstance(leaf, RowAdapters):
        return leaf._replace(layer=index)
    return MixedLayer(leaf, index) if isinstance(leaf, MixedStack) else NF4Layer(leaf, index)
