"""NF4 weights as bitsandbytes stores them in safetensors files: one of packed.READERS, see there."""

import json
from typing import Any

import numpy as np

from qlora_jax.io.json_object import parse_object
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.quant.formats import NF4
from qlora_jax.quant.nf4 import CODEBOOKS, NF4Tensor
from qlora_jax.quant.nf4.layout import BLOCK, NESTED_BLOCK
from qlora_jax.quant.nf4.tensor import packed_shapes

sampled, experts_only = True, False
STATE = "quant_state.bitsandbytes__"
DTYPES = ("bfloat16", "float16", "float32")


def holds(tensors: TensorFolder, name: str) -> bool:
    """Whether bitsandbytes packed the weight `name` in 4 bits."""
    return any(f"{name}.{STATE}{kind}" in tensors for kind in ("nf4", "fp4"))


def form(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> tuple[NF4, str]:
    """(how a weight is packed, the dtype that it is dequantized to), from the JSON beside it; raises as `read` does."""
    state = _state(tensors, name, shape)
    return NF4(double="nested_offset" in state), state["dtype"]


def origin(tensors: TensorFolder, name: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape that a packed weight had; what they are is checked where the weight is read."""
    kind = next(kind for kind in ("nf4", "fp4") if f"{name}.{STATE}{kind}" in tensors)
    state = _json(tensors, f"{name}.{STATE}{kind}")
    dtype, shape = state.get("dtype"), state.get("shape")
    if dtype not in DTYPES or not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError(f"{tensors.file(name)}: {name!r} has dtype {dtype!r} and shape {shape!r} in its quant_state")
    return dtype, tuple(shape)


def quantization_config(*, double: bool, dtype: str, kept: list[str] | None = None) -> dict[str, Any]:
    """What config.json says of weights that `write` packed.

    Args:
      dtype: of the arithmetic.
      kept: the linear layers that are not packed, as transformers matches them; None where only lm_head is not.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def read(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> NF4Tensor:
    """One packed weight, with the maps and the offset that the file holds.

    Args:
      name: such as "model.layers.0.self_attn.q_proj.weight".
      shape: (N, K) that the model expects.

    Raises:
      ValueError: another 4-bit type, block size, codebook or shape; a part that is absent or of another size.
    """
    state = _state(tensors, name, shape)
    double = "nested_offset" in state
    _check_levels(tensors, name)
    expected = packed_shapes(shape, state["dtype"], double=double)
    scales: tuple[Any, ...] = (_part(tensors, name, "absmax", expected.absmax),)
    if double:
        scales += (
            _part(tensors, name, "nested_absmax", expected.nested_absmax),
            _part(tensors, name, "nested_quant_map", expected.nested_levels),
            np.array(state["nested_offset"], np.float32),
        )
    return NF4Tensor.create(_codes(tensors, name, expected.codes), *scales, shape=shape, dtype=state["dtype"])


def write(name: str, tensor: NF4Tensor) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes reads one packed (not stacked) weight `name` from."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK}
    state |= {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    parts = {
        name: np.asarray(tensor.codes).reshape(-1, 1),
        f"{name}.absmax": np.asarray(tensor.absmax).reshape(-1),
        f"{name}.quant_map": CODEBOOKS[tensor.codebook],
    }
    if tensor.double:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(tensor.offset)
        parts[f"{name}.nested_absmax"] = np.asarray(tensor.nested_absmax)
        parts[f"{name}.nested_quant_map"] = np.asarray(tensor.nested_levels)
    parts[f"{name}.{STATE}nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts


def _state(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The JSON beside a weight, checked."""
    where = f"{tensors.file(name)}: {name!r}"
    if f"{name}.{STATE}fp4" in tensors:
        raise ValueError(f"{where} is fp4, expected nf4: quantize the model with bnb_4bit_quant_type='nf4'")
    state = _json(tensors, f"{name}.{STATE}nf4")
    expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    if "nested_offset" in state:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, want in expected.items():
        if state.get(key) != want:
            raise ValueError(f"{where} has {key} {state.get(key)!r}, expected {want!r}")
    if state.get("dtype") not in DTYPES:
        raise ValueError(f"{where} has dtype {state.get('dtype')!r}, expected one of {', '.join(DTYPES)}")
    return state


def _json(tensors: TensorFolder, name: str) -> dict[str, Any]:
    return parse_object(tensors.read(name).tobytes(), f"{tensors.file(name)}: {name!r}")


def _check_levels(tensors: TensorFolder, name: str) -> None:
    levels = tensors.read(f"{name}.quant_map")
    if levels.tobytes() != CODEBOOKS["nf4"].tobytes():
        raise ValueError(
            f"{tensors.file(name)}: the quant_map of {name!r} is not the NF4 codebook (it begins "
            f"{levels[:2].tolist()}): quantize the model again from its 16-bit weights"
        )


def _codes(tensors: TensorFolder, name: str, expected) -> np.ndarray:
    """The packed bytes, whatever dtype `bnb_4bit_quant_storage` made the file call them."""
    return _shaped(tensors, name, tensors.read(name).reshape(-1).view(np.uint8), expected)


def _part(tensors: TensorFolder, name: str, part: str, expected) -> np.ndarray:
    return _shaped(tensors, f"{name}.{part}", tensors.read(f"{name}.{part}"), expected)


def _shaped(tensors: TensorFolder, name: str, value: np.ndarray, expected) -> np.ndarray:
    size = int(np.prod(expected.shape))
    if value.dtype != expected.dtype or value.size != size:
        raise ValueError(
            f"{tensors.file(name)}: {name!r} is {value.dtype} of {value.size} elements, "
            f"expected {expected.dtype} of {size}"
        )
    return value.reshape(expected.shape)
