"""A base model's folder, with or without an adapter, as a folder in 4 bits."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.io import bitsandbytes
from qlora_jax.io.adapter import Adapter
from qlora_jax.io.companions import write_companions
from qlora_jax.io.export import (
    MERGES,
    Base,
    Weight,
    base_id,
    chat_template_of,
    dtype_of,
    merged,
    open_base,
    reading,
    with_adapter,
    write_weights,
)
from qlora_jax.io.folder import new_folder
from qlora_jax.io.identity import record_source
from qlora_jax.io.model_card import model_card
from qlora_jax.io.shards import SHARD_BYTES
from qlora_jax.models.families.names import OTHER_MODULES
from qlora_jax.models.params import Tensor
from qlora_jax.models.table import table
from qlora_jax.quant.formats import NF4


def export_bnb4(
    base_folder: str | Path,
    out: str | Path,
    adapter: Adapter | None = None,
    *,
    double: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base in bitsandbytes' 4-bit format: every decoder projection in NF4, the rest unpacked.

    What is not packed is written in the projections' dtype: transformers keeps the dtypes of such a folder, and does
    not run a model of several.

    The embedding and the output layer stay unpacked whatever quant.embedding and quant.lm_head were in training:
    transformers loads them in no other way from such a folder.

    Experts are packed one by one, gates and ups together, or stay in the 4-bit format that the base holds them in.
    transformers has no way to load packed experts: such a folder is for this package.

    With an adapter, it is added into the original weights first; quantizing the sum then loses part of it.
    Serve the 4-bit base and the adapter side by side where that matters.

    Raises:
      ValueError: a base that is packed already, or an adapter for another base.
      OSError: `out` is not empty, or the disk is full; nothing is left half-written.
    """
    base = open_base(Path(base_folder), adapter)
    if base.packed:
        raise ValueError(f"{base.folder} holds 4-bit weights already: give the folder of the original weights")

    dtype, packing, keeps = dtype_of(base), NF4(double), _keeps_experts(base)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        if weight.of_experts:
            return _held(weight, value, dtype) if keeps else _packed_experts(base, weight, value, packing, dtype)
        value = merged(base, weight, value, None, weight.dtype if weight.projection else dtype)
        if not weight.projection:
            return {weight.name: value}
        return bitsandbytes.write(weight.name, packing.quantize(jnp.asarray(value)))

    needed = sum(_packed_bytes(w, packing, dtype) for w in base.weights) + base.passed_bytes
    text = f"Its linear layers are in NF4{' with double quantization' if double else ''} for bitsandbytes."
    if any(weight.of_experts for weight in base.weights):
        text += " Its experts are in 4 bits, too, one by one: qlora-jax reads them, transformers does not."
    if adapter:
        text += f" A LoRA adapter was {MERGES['original']} before they were quantized."
    with new_folder(out, needed=needed) as partial:
        identity = write_weights(base, partial, convert, shard_bytes)
        if adapter is None:
            record_source(partial, identity)
        card = model_card("4-bit model", base_id(base), text, tags=("bitsandbytes", "4-bit"))
        settings = bitsandbytes.quantization_config(double=double, dtype=dtype, kept=_kept(base))
        template, tied = chat_template_of(base), base.config.tie_embeddings
        write_companions(base.folder, partial, dtype=dtype, tied=tied, quantization=settings, chat_template=template)
        (partial / "README.md").write_text(card)


def _keeps_experts(base: Base) -> bool:
    """Whether the base holds its experts in 4 bits already, and no adapter changes them."""
    experts = [weight for weight in base.weights if weight.reader and weight.reader.experts_only]
    return bool(experts) and not any(part.tensor.module in base.targets for w in experts for part in w.parts)


def _held(weight: Weight, value: Any, dtype: str) -> dict[str, np.ndarray]:
    """The experts' weights or biases of a layer as the base holds them."""
    return weight.reader.write(weight.name, value) if weight.reader else {weight.name: value.astype(dtype)}


def _packed_experts(base: Base, weight: Weight, value: Any, packing: NF4, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of which a file's tensor is the last part, each of one expert."""
    found: dict[str, np.ndarray] = {}
    read = reading(base, weight, value)
    joint = table(dataclasses.replace(base.config, names=base.config.names._replace(experts="joint")))
    for tensor in (part.tensor for part in weight.parts if part == part.tensor.parts[-1]):
        whole = tensor.gathered(lambda one: with_adapter(base, one, read(one)))
        [part] = Tensor(joint[tensor.param.path], tensor.place).parts
        if tensor.param.projection:
            packed = packing.quantize(jnp.asarray(whole.astype(weight.dtype)))
            found |= bitsandbytes.write(part.name, packed)
        else:
            found[part.name] = whole.astype(dtype)
    return found


def _packed_bytes(weight: Weight, packing: NF4, dtype: str) -> int:
    if weight.projection:
        return packing.shapes(jax.ShapeDtypeStruct(weight.shape, jnp.dtype(weight.dtype))).nbytes
    return math.prod(weight.shape) * jnp.dtype(dtype).itemsize


def _kept(base: Base) -> list[str] | None:
    """The linear layers that a 4-bit folder holds unpacked, as transformers matches them: beginnings and ends of names.

    None where these are those that it leaves out by itself.
    """
    gates = [part.tensor.module for w in base.weights for part in w.parts if part.tensor.param.role == "gate"]
    found = sorted({".".join(module.split(".")[-2:]) for module in gates})
    found += OTHER_MODULES if base.passed else ()
    return ["lm_head", *found] if found else None
