"""Which decoder projections a 4-bit folder holds packed, and which it keeps as they were.

The rule of every command: what a 4-bit folder keeps stays so, unless quant="nf4" is asked for, which packs the rest and
says what.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.io import mxfp4
from qlora_jax.io.bitsandbytes import DTYPES
from qlora_jax.io.packed import Form, form_of
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Param, Tensor
from qlora_jax.models.table import table
from qlora_jax.quant.formats import MXFP4, NF4

log = logging.getLogger("qlora_jax.io")


# For a projection's path, every layer's form; None where the layer is not packed.
Forms = Mapping[str, tuple[Form | None, ...]]


def folder_forms(config: ModelConfig, tensors: TensorFolder, *, experts: bool = True) -> Forms:
    """Every projection of a folder that packs any; nothing for a folder that packs none.

    A folder in MXFP4 packs experts alone, and says nothing of the others.

    Args:
      experts: whether experts count.

    Raises:
      ValueError: layers of one projection that are packed differently, or a packed weight that cannot be read.
    """
    counted = [param for param in _projections(config) if experts or param.role != "expert"]
    forms = _without_silent({one.path: tuple(_form(tensors, tensor) for tensor in one.tensors()) for one in counted})
    for param in (param for param in counted if param.path in forms):
        _check_equal(tensors.folder, param, forms[param.path])
    return forms


def _without_silent(forms: Mapping[str, tuple[Form | None, ...]]) -> dict[str, tuple[Form | None, ...]]:
    """Without what the folder says nothing of."""
    found = {form.format.name for layers in forms.values() for form in layers if form}
    if found <= {MXFP4.name}:
        return {path: layers for path, layers in forms.items() if any(layers)}
    return dict(forms)


def stated_forms(config: ModelConfig, settings: Mapping[str, Any]) -> Forms:
    """The same as far as a config.json says it, for where there are no weights to look at.

    transformers leaves out what lies below a name in `llm_int8_skip_modules`, or ends in it.
    """
    stated = settings.get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == "mxfp4":
        held = Form(MXFP4(), mxfp4.DTYPE)
        return {p.path: (held,) * len(list(p.tensors())) for p in _projections(config) if p.role == "expert"}
    if not isinstance(stated, dict) or not stated.get("load_in_4bit"):
        return {}
    listed = stated.get("llm_int8_skip_modules")
    skipped = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    form = Form(NF4(bool(stated.get("bnb_4bit_use_double_quant"))), dtype if dtype in DTYPES else DTYPES[0])

    def kept(module: str) -> bool:
        return any(f"{module}.".startswith(f"{name}.") or module.endswith(name) for name in skipped)

    return {
        param.path: tuple(None if kept(tensor.module) else form for tensor in param.tensors())
        for param in _projections(config)
    }


def kept_names(config: ModelConfig, forms: Forms) -> list[str]:
    """The projections that are not packed, as a checkpoint names them."""
    return [
        tensor.module
        for param in _projections(config)
        for tensor, form in zip(param.tensors(), forms.get(param.path, ()), strict=False)
        if form is None
    ]


def all_packed(forms: Forms) -> Forms:
    """With every layer in the form of the others."""
    usual = next((form for layers in forms.values() for form in layers if form), None)
    return {path: tuple(form or next(filter(None, layers), usual) for form in layers) for path, layers in forms.items()}


def report_kept(folder: Path, config: ModelConfig, forms: Forms, *, packed: bool) -> None:
    """Logs which projections a 4-bit folder keeps unpacked, and whether they are packed now."""
    names = kept_names(config, forms)
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        total = sum(map(len, forms.values()))
        way = "packed in NF4 now" if packed else "they stay so"
        log.info(f"{folder} keeps {len(names)} of {total} projections unpacked, {way}: {shown}")


def _form(tensors: TensorFolder, tensor: Tensor) -> Form | None:
    """How an array is packed: all of its parts alike. Raises ValueError where they are not."""
    forms = {form_of(tensors, part.name, part.whole): part.name for part in tensor.parts}
    if len(forms) > 1:
        raise ValueError(f"{tensors.folder} packs {' and '.join(forms.values())} differently: quantize the model again")
    return next(iter(forms))


def _projections(config: ModelConfig) -> list[Param]:
    return [param for param in table(config).values() if param.projection]


def _check_equal(folder: Path, param: Param, layers: tuple[Form | None, ...]) -> None:
    if param.role == "expert" and None in layers and any(layers):
        first = next(tensor.name for tensor, form in zip(param.tensors(), layers, strict=True) if form is None)
        raise NotImplementedError(
            f"{folder} packs some experts and not {first!r}: quantize the model again, all of them"
        )
    found = {form: tensor.name for tensor, form in zip(param.tensors(), layers, strict=True) if form}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{folder} packs {first!r} as {one} and {second!r} as {other}: quantize the model again, in one way"
        )
