"""Other 4-bit formats, simulated: a weight rounded to 16 levels and back, for measuring what the rounding costs.

Nothing is stored in 4 bits here: training and serving know NF4 alone, and these are what it is compared with. Blocks
and scales are those of NF4 without double quantization.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import Array, Float

from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from qlora_jax.models.adapters import projections
from qlora_jax.models.decoder import Decoder
from qlora_jax.quant import nf4
from qlora_jax.quant.nf4 import CODEBOOKS
from qlora_jax.quant.rules import UNPACKED


def rounded_to(weight: Float[Array, "N K"], name: str) -> Float[Array, "N K"]:
    """A float32 weight after rounding to the levels `name`, a key of CODEBOOKS, and back."""
    return nf4.quantize(weight, double=False, codebook=name).dequantize()


def nf4_double(weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """A float32 weight after NF4 with double quantization and back: what QLoRA trains on."""
    return nf4.quantize(weight).dequantize()


# Every format by its name, as a function from a float32 weight to what is left of it.
FORMATS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "nf4-dq": nf4_double,
    **{name: functools.partial(rounded_to, name=name) for name in CODEBOOKS},
}


def round_model(model: Decoder, name: str) -> None:
    """Rounds a float32 decoder's projections to a format and back, in place."""
    for _, linear in projections(model):
        weight = linear.weight.get_value()
        each = jax.vmap(FORMATS[name])(weight.reshape(-1, *weight.shape[-2:]))
        linear.weight.set_value(each.reshape(weight.shape))


def write_rounded(source: Path, out: Path, name: str) -> None:
    """Writes a model folder as another, its projections rounded to a format and back, in float32.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: as loading the folder does.
    """
    model = load_model(source, dtype="float32", rules=UNPACKED).model
    round_model(model, name)
    write_model(model, out, source)
