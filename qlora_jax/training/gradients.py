"""The gradient of a batch in microbatches, summed in one buffer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from qlora_jax.config import Pieces
from qlora_jax.lora.tapped import tap
from qlora_jax.objective import Measured, Objective


class Gradients(NamedTuple):
    """What a batch says about what is trained.

    Attributes:
      sums: the gradient of the microbatches' totals, in the structure of what is trained.
      weight: float32, what `sums` is to be divided by, as the objective says.
      metrics: the objective's, and `grad_norm` (of the mean, before clipping).
    """

    sums: Any
    weight: jax.Array
    metrics: dict[str, jax.Array]

    def mean(self, like: Any) -> Any:
        """The gradient of the mean loss, in the dtypes of `like`."""
        return jax.tree.map(lambda g, p: (g / self.weight).astype(p.dtype), self.sums, like)


def make_gradients(
    graphdef: nnx.GraphDef, objective: Objective, pieces: Pieces, dtype: Any = None
) -> Callable[..., Gradients]:
    """`gradients(trained, base, batch, key) -> Gradients`, to be jitted.

    Args:
      dtype: of `sums`; None is each parameter's own. Another one needs parameters that are used through `astype` alone,
        as adapters are.
    """

    def gradients(trained, base, batch, key) -> Gradients:
        def measure(variables, microbatch, key) -> Measured:
            tapped = variables if dtype is None else tap(trained, variables)
            return objective.measure(nnx.merge(graphdef, tapped, base), microbatch, pieces, key)

        # What is differentiated by: the parameters, or taps that lend the gradient their dtype.
        variables = trained if dtype is None else jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), trained)
        accumulate = _accumulate_apart if needs_own_buffers(variables, pieces) else _accumulate
        measured, sums = accumulate(measure, variables, batch, key, objective.zeros())
        weight = objective.weight(measured).astype(jnp.float32)
        found = Gradients(sums, weight, objective.metrics(measured))
        found.metrics["grad_norm"] = optax.tree.norm(found.mean(like=trained))
        return found

    return gradients


def _accumulate(measure, variables, batch, key, zeros):
    """The objective's sums and the gradient's sum over the microbatches.

    The backward passes add to the same buffers (`with_refs`): no microbatch's own gradient exists beside the sum.
    """
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(variables)
    sums = [jax.new_ref(jnp.zeros_like(leaf)) for leaf in leaves]

    def body(measured, xs):
        microbatch, dropout = _microbatch(xs, key)

        def of_leaves(leaves):
            return measure(structure.unflatten(leaves), microbatch, dropout)

        total, backward, more = jax.vjp(of_leaves, leaves, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(total))  # type: ignore[attr-defined]
        return jax.tree.map(jnp.add, measured, more), None

    measured, _ = lax.scan(body, zeros, _numbered(batch))
    return measured, structure.unflatten([jax.ref.freeze(ref) for ref in sums])


def _accumulate_apart(measure, variables, batch, key, zeros):
    """`_accumulate` with a microbatch's own gradient beside the sum."""

    def body(carry, xs):
        microbatch, dropout = _microbatch(xs, key)
        (_, more), found = jax.value_and_grad(measure, has_aux=True)(variables, microbatch, dropout)
        return jax.tree.map(jnp.add, carry, (more, found)), None

    return lax.scan(body, (zeros, jax.tree.map(jnp.zeros_like, variables)), _numbered(batch))[0]


def _numbered(batch) -> tuple[Any, jax.Array]:
    """The microbatches and their numbers, to be scanned."""
    return batch, jnp.arange(len(jax.tree.leaves(batch)[0]))


def _microbatch(xs, key) -> tuple[Any, jax.Array | None]:
    """One of `_numbered`, and its own dropout key."""
    microbatch, index = xs
    return microbatch, None if key is None else jax.random.fold_in(key, index)


def needs_own_buffers(variables: Any, pieces: Pieces) -> bool:
    """Whether a microbatch's gradient cannot be added in place: a head, or a table tied to it, is trained in slices.

    jax 0.10.2 then hands the head's buffer the gradient of the features, and fails; seen with the 7B geometry, not with
    small ones (tests/aot/test_plan.py compiles that step).
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return pieces.vocab_chunk > 0 and any("lm_head" in path or "embed_tokens" in path for path in paths)
