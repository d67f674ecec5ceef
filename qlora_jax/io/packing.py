"""Which decoder projections a 4-bit folder holds packed, and which it keeps as they were.

The rule of every command: what a 4-bit folder keeps stays so, unless quant="nf4" is asked for, which packs the rest and
says what.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.io.bitsandbytes import DTYPES, is_nf4, nf4_form
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import hf_name, parameter_specs

log = logging.getLogger("qlora_jax.io")


class Form(NamedTuple):
    """How a matrix is packed: with double quantization or not, and in which dtype it is dequantized."""

    double: bool
    dtype: str


# For a projection's path, every layer's form; None where the layer is not packed.
Forms = Mapping[str, tuple[Form | None, ...]]


def folder_forms(config: ModelConfig, tensors: TensorFolder) -> Forms:
    """Every projection of a folder that packs any; nothing for a folder that packs none.

    Raises:
      ValueError: layers of one projection that are packed differently, or a packed weight that cannot be read.
    """
    forms = {
        path: tuple(_form(tensors, hf_name(path, layer), spec.shape) for layer in range(config.num_layers))
        for path, spec in parameter_specs(config).items()
        if spec.projection
    }
    if not any(form for layers in forms.values() for form in layers):
        return {}
    for path, layers in forms.items():
        _check_equal(tensors.folder, path, layers)
    return forms


def stated_forms(config: ModelConfig, settings: Mapping[str, Any]) -> Forms:
    """The same as far as a config.json says it, for where there are no weights to look at.

    transformers leaves out what lies below a name in `llm_int8_skip_modules`, or ends in it.
    """
    stated = settings.get("quantization_config")
    if not isinstance(stated, dict) or not stated.get("load_in_4bit"):
        return {}
    listed = stated.get("llm_int8_skip_modules")
    skipped = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    form = Form(bool(stated.get("bnb_4bit_use_double_quant")), dtype if dtype in DTYPES else DTYPES[0])

    def kept(module: str) -> bool:
        return any(f"{module}.".startswith(f"{name}.") or module.endswith(name) for name in skipped)

    return {
        path: tuple(
            None if kept(hf_name(path, layer).removesuffix(".weight")) else form for layer in range(config.num_layers)
        )
        for path, spec in parameter_specs(config).items()
        if spec.projection
    }


def kept_names(forms: Forms) -> list[str]:
    """The projections that are not packed, as a checkpoint names them."""
    return [
        hf_name(path, layer).removesuffix(".weight")
        for path, layers in forms.items()
        for layer, form in enumerate(layers)
        if form is None
    ]


def all_packed(forms: Forms) -> Forms:
    """With every layer in the form of the others."""
    usual = next((form for layers in forms.values() for form in layers if form), None)
    return {path: tuple(form or next(filter(None, layers), usual) for form in layers) for path, layers in forms.items()}


def report_kept(folder: Path, forms: Forms, *, packed: bool) -> None:
    """Logs which projections a 4-bit folder keeps unpacked, and whether they are packed now."""
    names = kept_names(forms)
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        total = sum(map(len, forms.values()))
        way = "packed in NF4 now" if packed else "they stay so"
        log.info(f"{folder} keeps {len(names)} of {total} projections unpacked, {way}: {shown}")


def _form(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> Form | None:
    return Form(*nf4_form(tensors, name, shape)) if is_nf4(tensors, name) else None


def _check_equal(folder: Path, path: str, layers: tuple[Form | None, ...]) -> None:
    found = {form: layer for layer, form in enumerate(layers) if form}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{folder} packs {hf_name(path, first)!r} as {one} and {hf_name(path, second)!r} as {other}: quantize the "
            f"model again, in one way"
        )
