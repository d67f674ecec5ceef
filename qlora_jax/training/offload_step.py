"""The train step with the optimizer's state in host memory: a program for the gradients, then one for every page."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.config import Pieces
from qlora_jax.device.facts import ProgramMemory, tree_bytes
from qlora_jax.objective import Objective
from qlora_jax.training.gradients import make_gradients
from qlora_jax.training.offload import HostState, make_page_update


@dataclasses.dataclass(frozen=True)
class PagedStep:
    """`step(trained, state, base, batch, key) -> (trained, state, metrics)`, as `make_train_step` gives it.

    state is a HostState; it and what is trained are donated. The gradients are outputs of their own program, on the
    device until the last page is updated. `lower` and `compile` are those of a jitted function.

    Attributes:
      gradients, update: jitted functions, or compiled ones; update is of a layer.
      update_rest: of what is trained outside the layers. None where it is not needed.
      resident: bytes of the base, which the updates' programs know nothing of.
    """

    gradients: Any
    update: Any
    update_rest: Any
    resident: int = 0

    def __call__(self, trained, state: HostState, base, batch, key):
        found = self.gradients(trained, base, batch, key)
        layers, rest = [], state.rest
        for index, layer in enumerate(state.layers):
            # All run on one stream, so that the device memory of a page is free for the next one.
            trained, layer = self.update(trained, layer, found, np.int32(index))
            layers.append(layer)
        if rest is not None:
            trained, rest = self.update_rest(trained, rest, found, None)
        return trained, HostState(layers, rest), found.metrics

    def lower(self, trained, state: HostState, base, batch, key) -> "PagedStep":
        """The programs for these arrays or shapes, lowered."""
        found = jax.eval_shape(self.gradients, trained, base, batch, key)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return PagedStep(
            self.gradients.lower(trained, base, batch, key),
            self.update.lower(trained, state.layers[0], found, index) if state.layers else None,
            None if state.rest is None else self.update.lower(trained, state.rest, found, None),
            tree_bytes(base),
        )

    def compile(self, compiler_options: dict[str, Any] | None = None) -> "PagedStep":
        """The lowered programs, compiled."""

        def compiled(lowered):
            return lowered and lowered.compile(compiler_options=compiler_options)

        return PagedStep(compiled(self.gradients), compiled(self.update), compiled(self.update_rest), self.resident)

    def memory_analysis(self) -> ProgramMemory:
        """The memory of that compiled program which takes most, with all that lies on the device meanwhile.

        XLA counts a page in host memory apart (`host_argument_size_in_bytes`), its copy on the device as temporary.
        """
        updates = [update for update in (self.update, self.update_rest) if update is not None]
        sizes = [ProgramMemory.of(self.gradients), *(ProgramMemory.of(update, self.resident) for update in updates)]
        return max(sizes, key=lambda size: size.peak)


def make_paged_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    pieces: Pieces,
    gradients: Any = None,
) -> PagedStep:
    """The step of `make_train_step` with the optimizer's state in pages, as `init_state` makes it."""
    update = make_page_update(optimizer)
    return PagedStep(jax.jit(make_gradients(graphdef, objective, pieces, gradients)), update, update)
