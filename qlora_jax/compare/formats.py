"""Other 4-bit formats, simulated: a weight rounded to 16 levels and back, for measuring what the rounding costs.

Nothing is stored in 4 bits here: training and serving know NF4 alone (`qlora_jax.quant.nf4`), and these are what it is
compared with. Blocks and scales are those of NF4 without double quantization: 64 elements in row-major order share the
largest magnitude among them, in float32.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from qlora_jax.models.adapters import linears
from qlora_jax.models.blocks.layers import Linear
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import STACK
from qlora_jax.quant import nf4
from qlora_jax.quant.nf4.codebook import NF4_LEVELS, thresholds
from qlora_jax.quant.nf4.tensor import BLOCK


def _signed(magnitudes: list[float]) -> np.ndarray:
    """Ascending float32 levels in [-1, 1] from non-negative magnitudes; zero once."""
    positive = np.array(magnitudes, np.float32) / np.float32(max(magnitudes))
    return np.unique(np.concatenate([-positive, positive]))


# Four bits give 16 codes; where both signs have a zero, 15 levels differ.
LEVELS = {
    "nf4": NF4_LEVELS,
    # Two bits of exponent, one of mantissa, with subnormals (OCP Microscaling Formats v1.0, E2M1).
    "fp4-e2m1": _signed([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    # bitsandbytes' FP4: the same but for its smallest magnitude, which is 0.0625.
    "fp4-bnb": _signed([0, 0.0625, 2, 3, 4, 6, 8, 12]),
    # Three bits of exponent: powers of two.
    "fp4-e3m0": _signed([0, 1, 2, 4, 8, 16, 32, 64]),
    # Integers, symmetric around zero, as scaling by the largest magnitude makes them.
    "int4": _signed([0, 1, 2, 3, 4, 5, 6, 7]),
}


@functools.partial(jax.jit, static_argnames="name")
def rounded_to(weight: Float[Array, "N K"], name: str) -> Float[Array, "N K"]:
    """A float32 weight after rounding to the format `name`, a key of LEVELS, and back."""
    levels = LEVELS[name]
    flat = jnp.pad(weight.reshape(-1), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(flat).max(-1, keepdims=True)
    scaled = flat / jnp.where(absmax > 0, absmax, 1)
    nearest = jnp.searchsorted(jnp.asarray(thresholds(levels)), scaled)
    return (jnp.asarray(levels)[nearest] * absmax).reshape(-1)[: weight.size].reshape(weight.shape)


def nf4_double(weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """A float32 weight after NF4 with double quantization and back: what QLoRA trains on."""
    return nf4.dequantize(nf4.quantize(weight, double=True))


# Every format by its name, as a function from a float32 weight to what is left of it.
FORMATS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "nf4-dq": nf4_double,
    **{name: functools.partial(rounded_to, name=name) for name in LEVELS},
}


def round_model(model: Decoder, name: str) -> None:
    """Rounds a float32 decoder's projections to a format and back, in place."""
    for linear in projections(model):
        linear.weight.set_value(jax.vmap(FORMATS[name])(linear.weight.get_value()))


def projections(model: Decoder) -> list[Linear]:
    """The linear layers that QLoRA stores in NF4, each a stack `[L, N, K]`."""
    return [linear for path, linear in linears(model) if path.startswith(STACK)]


def write_rounded(source: Path, out: Path, name: str) -> None:
    """Writes a model folder as another, its projections rounded to a format and back, in float32.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: as loading the folder does.
    """
    model = load_model(source, dtype="float32", quant="none").model
    round_model(model, name)
    write_model(model, out, source)
