"""The gradient of a batch in microbatches, summed in one buffer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from qlora_jax.lora.tapped import tap
from qlora_jax.objective.tokens import next_token_loss, vocab_slices
from qlora_jax.training.batch import TensorBatch


class Gradients(NamedTuple):
    """What a batch says about the adapters.

    Attributes:
      sums: the gradient of the summed loss, in the structure of the adapters.
      scored: float32, what `sums` is to be divided by: the number of scored tokens, at least 1.
      metrics: `loss` (mean), `tokens` (scored) and `grad_norm` (of the mean, before clipping).
    """

    sums: Any
    scored: jax.Array
    metrics: dict[str, jax.Array]

    def mean(self, like: Any) -> Any:
        """The gradient of the mean loss, in the dtypes of `like`."""
        return jax.tree.map(lambda g, p: (g / self.scored).astype(p.dtype), self.sums, like)


def make_gradients(
    graphdef: nnx.GraphDef,
    *,
    remat: str,
    loss_chunk: int,
    vocab_chunk: int = 0,
    mlp_chunk: int = 0,
    dtype: Any = None,
) -> Callable[..., Gradients]:
    """`gradients(adapters, base, batch, key) -> Gradients`, to be jitted.

    Args:
      dtype: of `sums`; None is each parameter's own. Another one needs parameters that are used through `astype` alone,
        as adapters are.
    """

    def loss(adapters, base, batch, key):
        model = nnx.merge(graphdef, adapters, base)
        hidden = model.hidden(
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            embedded=batch.embedded,
            remat=remat,
            mlp_chunk=mlp_chunk,
            key=key,
        )
        slices = vocab_slices(vocab_chunk, model.config.vocab_size)
        return next_token_loss(hidden, batch.tokens, batch.scored, model.logits, chunk=loss_chunk, slices=slices)

    def gradients(adapters, base, batch, key) -> Gradients:
        def loss_of(variables, *rest):
            return loss(variables if dtype is None else tap(adapters, variables), *rest)

        # What is differentiated by: the adapters, or taps that lend the gradient their dtype.
        variables = adapters if dtype is None else jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), adapters)
        accumulate = _accumulate_apart if needs_own_buffers(variables, vocab_chunk) else _accumulate
        total, count, sums = accumulate(loss_of, variables, base, batch, key)
        scored = jnp.maximum(count, 1).astype(jnp.float32)
        found = Gradients(sums, scored, {"loss": total / scored, "tokens": count})
        found.metrics["grad_norm"] = optax.tree.norm(found.mean(like=adapters))
        return found

    return gradients


def _accumulate(loss, variables, base, batch: TensorBatch, key):
    """Loss sum, scored tokens and gradient sum over the microbatches.

    The backward passes add to the same buffers (`with_refs`): no microbatch's own gradient exists beside the sum.
    """
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(variables)
    sums = [jax.new_ref(jnp.zeros_like(leaf)) for leaf in leaves]

    def body(carry, xs):
        microbatch, index = xs
        dropout = None if key is None else jax.random.fold_in(key, index)

        def of_leaves(leaves):
            return loss(structure.unflatten(leaves), base, microbatch, dropout)

        total, backward, count = jax.vjp(of_leaves, leaves, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(total))  # type: ignore[attr-defined]
        return (carry[0] + total, carry[1] + count), None

    start = jnp.float32(0), jnp.int32(0)
    (total, count), _ = lax.scan(body, start, (batch, jnp.arange(batch.tokens.shape[0])))
    return total, count, structure.unflatten([jax.ref.freeze(ref) for ref in sums])


def _accumulate_apart(loss, variables, base, batch: TensorBatch, key):
    """`_accumulate` with a microbatch's own gradient beside the sum."""

    def body(carry, xs):
        microbatch, index = xs
        dropout = None if key is None else jax.random.fold_in(key, index)
        (total, count), found = jax.value_and_grad(loss, has_aux=True)(variables, base, microbatch, dropout)
        return jax.tree.map(jnp.add, carry, (total, count, found)), None

    start = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, variables))
    return lax.scan(body, start, (batch, jnp.arange(batch.tokens.shape[0])))[0]


def needs_own_buffers(variables: Any, vocab_chunk: int) -> bool:
    """Whether a microbatch's gradient cannot be added in place: a head, or a table tied to it, is trained in slices.

    jax 0.10.2 then hands the head's buffer the gradient of the features, and fails; seen with the 7B geometry, not with
    small ones (tests/aot/test_plan.py compiles that step).
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return vocab_chunk > 0 and any("lm_head" in path or "embed_tokens" in path for path in paths)
