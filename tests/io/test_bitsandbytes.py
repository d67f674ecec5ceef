"""bitsandbytes' 4-bit format against bitsandbytes itself, on the CPU."""

import json

import bitsandbytes
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qlora_jax.io.bitsandbytes import form, holds, quantization_config, read, write
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.quant.nf4 import dequantize, quantize
from tests.io.torch_model import load, logits

NAME = "model.layers.0.self_attn.q_proj.weight"
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def packed_by_bitsandbytes(weight, *, double=True, storage=torch.uint8, kind="nf4", block=64):
    """(the safetensors tensors of `weight`, what bitsandbytes dequantizes them to)."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    parts = {NAME: codes, **{f"{NAME}.{key}": v for key, v in state.as_dict(packed=True).items()}}
    return parts, bitsandbytes.functional.dequantize_4bit(codes, state)


def folder_with(tmp_path, parts) -> TensorFolder:
    tmp_path.mkdir(exist_ok=True)
    save_file({name: to_numpy(value) for name, value in parts.items()}, tmp_path / "model.safetensors")
    return TensorFolder(tmp_path)


def to_numpy(value) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint8).numpy().view(ml_dtypes.bfloat16)
    return value.contiguous().numpy()


def random_weight(shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(128, 192), (6, 10), (7, 9)])
def test_reads_what_bitsandbytes_packed(tmp_path, shape, double, dtype):
    parts, expected = packed_by_bitsandbytes(random_weight(shape, dtype), double=double)
    tensors = folder_with(tmp_path, parts)
    tensor = read(tensors, NAME, shape)
    assert (tensor.double, tensor.dtype, tensor.shape) == (double, DTYPES[dtype], shape)
    assert holds(tensors, NAME) and form(tensors, NAME, shape)[1] == DTYPES[dtype]
    np.testing.assert_array_equal(np.asarray(dequantize(tensor)), to_numpy(expected))


STORAGES = {
    **{torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"},
    **{torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"},
}


@pytest.mark.parametrize("storage", STORAGES)
def test_reads_every_quant_storage(tmp_path, storage):
    parts, expected = packed_by_bitsandbytes(random_weight((64, 128)), storage=storage)
    tensors = folder_with(tmp_path, parts)
    assert tensors.dtype(NAME) == STORAGES[storage]
    np.testing.assert_array_equal(np.asarray(dequantize(read(tensors, NAME, (64, 128)))), to_numpy(expected))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(128, 192), (6, 10), (7, 9)])
def test_writes_the_bytes_that_bitsandbytes_writes(shape, double):
    weight = random_weight(shape)
    theirs, _ = packed_by_bitsandbytes(weight, double=double)
    ours = write(NAME, quantize(jnp.asarray(to_numpy(weight)), double=double))
    assert set(ours) == set(theirs)
    state_name = f"{NAME}.quant_state.bitsandbytes__nf4"
    for name in theirs.keys() - {state_name, f"{NAME}.nested_absmax"}:
        np.testing.assert_array_equal(ours[name], to_numpy(theirs[name]), err_msg=name)
    our_state, their_state = (json.loads(to_numpy(t[state_name]).tobytes()) for t in (ours, theirs))
    assert list(our_state) == list(their_state)
    # A mean's last bit depends on the order of its additions.
    offsets = our_state.pop("nested_offset", 0.0), their_state.pop("nested_offset", 0.0)
    assert offsets[0] == pytest.approx(offsets[1], rel=3e-7)
    assert our_state == their_state


def test_written_and_read_is_the_same_tensor(tmp_path):
    tensor = quantize(jnp.asarray(to_numpy(random_weight((64, 128)))))
    again = read(folder_with(tmp_path, write(NAME, tensor)), NAME, (64, 128))
    for field in ("codes", "absmax", "nested_absmax", "nested_levels", "offset"):
        np.testing.assert_array_equal(getattr(again, field), getattr(tensor, field), err_msg=field)


def changed_state(parts, **changes):
    name = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(to_numpy(parts[name]).tobytes()) | changes
    return parts | {name: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def test_refuses_another_shape(tmp_path):
    parts, _ = packed_by_bitsandbytes(random_weight((64, 128)))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' has shape \[64, 128\], expe"):
        read(folder_with(tmp_path, parts), NAME, (128, 64))


def test_refuses_another_block_size(tmp_path):
    parts, _ = packed_by_bitsandbytes(random_weight((64, 128)), block=128)
    with pytest.raises(ValueError, match="has blocksize 128, expected 64"):
        read(folder_with(tmp_path, parts), NAME, (64, 128))


def test_refuses_fp4(tmp_path):
    parts, _ = packed_by_bitsandbytes(random_weight((64, 128)), kind="fp4")
    tensors = folder_with(tmp_path, parts)
    assert holds(tensors, NAME)
    with pytest.raises(ValueError, match="is fp4, expected nf4: quantize the model with bnb_4bit_quant_type='nf4'"):
        read(tensors, NAME, (64, 128))


def test_refuses_another_codebook(tmp_path):
    parts, _ = packed_by_bitsandbytes(random_weight((64, 128)))
    levels = to_numpy(parts[f"{NAME}.quant_map"]).copy()
    levels[3] = np.nextafter(levels[3], np.float32(1))
    with pytest.raises(ValueError, match="is not the NF4 codebook .* quantize the model again from its 16-bit"):
        read(folder_with(tmp_path, parts | {f"{NAME}.quant_map": levels}), NAME, (64, 128))


def test_refuses_another_dtype_and_a_missing_or_short_part(tmp_path):
    parts, _ = packed_by_bitsandbytes(random_weight((64, 128)))
    with pytest.raises(ValueError, match="has dtype 'float64', expected one of bfloat16, float16, float32"):
        read(folder_with(tmp_path / "a", changed_state(parts, dtype="float64")), NAME, (64, 128))
    wide = parts | {f"{NAME}.absmax": np.zeros(128, np.float32)}
    with pytest.raises(ValueError, match="absmax' is float32 of 128 elements, expected uint8 of 128"):
        read(folder_with(tmp_path / "d", wide), NAME, (64, 128))
    nested = parts | {f"{NAME}.nested_absmax": np.zeros(1, np.float16)}
    with pytest.raises(ValueError, match="nested_absmax' is float16 of 1 elements, expected float32 of 1"):
        read(folder_with(tmp_path / "e", nested), NAME, (64, 128))
    short = parts | {f"{NAME}.absmax": np.zeros(127, np.uint8)}
    with pytest.raises(ValueError, match="absmax' is uint8 of 127 elements, expected uint8 of 128"):
        read(folder_with(tmp_path / "b", short), NAME, (64, 128))
    del short[f"{NAME}.absmax"]
    with pytest.raises(ValueError, match="holds no tensor 'model.layers.0.self_attn.q_proj.weight.absmax'"):
        read(folder_with(tmp_path / "c", short), NAME, (64, 128))


def quantized_by_transformers(base, *, double=True):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load(base, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu")


@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_our_folder_with_equal_logits(base, tmp_path, double):
    export_bnb4(base, tmp_path / "ours", double=double)
    theirs = quantized_by_transformers(base, double=double)
    ours = load(tmp_path / "ours", dtype="auto", device_map="cpu")
    assert isinstance(ours.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert ours.dtype == torch.bfloat16
    # With double quantization the mean's last bit may differ, and with it a weight's rounding.
    np.testing.assert_allclose(logits(ours), logits(theirs), rtol=0, atol=2e-3 if double else 0)
    assert np.abs(logits(ours) - logits(load(base, dtype=torch.bfloat16))).max() > 0.05  # NF4 is felt


def test_our_folder_is_the_one_that_transformers_saves(base, tmp_path):
    export_bnb4(base, tmp_path / "ours")
    quantized_by_transformers(base).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert {k: (v.dtype, v.shape) for k, v in ours.items() if "quant_state" not in k} == {
        k: (v.dtype, v.shape) for k, v in theirs.items() if "quant_state" not in k
    }
    np.testing.assert_array_equal(ours[NAME], theirs[NAME])
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == settings
    assert quantization_config(double=True, dtype="bfloat16") == settings["quantization_config"]


def test_a_packed_base_is_not_packed_again(base, tmp_path):
    export_bnb4(base, tmp_path / "once")
    with pytest.raises(ValueError, match="once holds 4-bit weights already: give the folder of the original weights"):
        export_bnb4(tmp_path / "once", tmp_path / "twice")
