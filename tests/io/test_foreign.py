"""Folders of other kinds are named for what they are, with the next step."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import read_adapter
from qlora_jax.quant.rules import rules_for

GPTQ = {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}
AWQ = {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}
MLX = {"weight": np.uint32, "scales": np.float16, "biases": np.float16}
# For each kind: how config.json names it, what it has in place of a projection's weight, and its name in words.
KINDS = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, GPTQ, "GPTQ"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, AWQ, "AWQ"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}},
        {"weight": ml_dtypes.float8_e4m3fn, "weight_scale_inv": np.float32},
        "FP8",
    ),
    "compressed": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"weight_packed": np.int32, "weight_scale": np.float16, "weight_shape": np.int64},
        "compressed-tensors",
    ),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 4}}, MLX, "MLX"),
    "int8": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"weight": np.int8, "SCB": np.float32},
        "bitsandbytes int8",
    ),
    "another": ({"quantization_config": {"quant_method": "spqr"}}, {"dense": np.int32}, "'spqr'"),
}


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint(), tmp_path / "model")


def load(folder):
    return load_model(folder, dtype="float32", rules=rules_for("auto"))


def quantize(folder, parts) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        del tensors[name]
        module = name.removesuffix("weight")
        tensors |= {f"{module}{part}": np.zeros((4, 4), dtype) for part, dtype in parts.items()}
    save_file(tensors, folder / "model.safetensors")


def configure(folder, changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_another_quantization(kind, folder):
    changes, parts, words = KINDS[kind]
    message = f"model is quantized with {words}, which is not read: give the folder of the original 16-bit weights"
    quantize(folder, parts)
    configure(folder, changes)
    with pytest.raises(NotImplementedError, match=message):
        load(folder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("another", "awq")])
def test_another_quantization_that_config_json_does_not_tell(kind, folder):
    _, parts, words = KINDS[kind]
    quantize(folder, parts)
    with pytest.raises(NotImplementedError, match=f"is quantized with {words}"):
        load(folder)


def test_an_adapter(folder):
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(
        ValueError, match=r"is an adapter, no model: give the model .*\(org/base\) and this folder as --"
    ):
        load(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="is an adapter, no model: give the model that it was trained on and this"):
        load(folder)


def test_a_run(folder):
    (folder / "checkpoints").mkdir()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is a run of train.py, no model: give its adapter subfolder as --adapter"):
        load(folder)


@pytest.mark.parametrize("config", [True, False])
def test_gguf_only(config, folder):
    (folder / "model.safetensors").rename(folder / "model-q4_k_m.gguf")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(
        (ValueError, FileNotFoundError), match="holds GGUF files for llama.cpp only: give the folder of"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_only(name, folder):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        FileNotFoundError, match="holds pickled PyTorch weights only: convert them to safetensors first"
    ):
        load(folder)


def test_a_file_of_another_name(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 'model.fp16.safetensors', expected model.safetensors or model"):
        load(folder)


def test_64_bits_are_read(folder):
    expected = load(folder).model
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.astype(np.float64) for name, value in tensors.items()}, folder / "model.safetensors")
    got = load(folder).model
    np.testing.assert_array_equal(got.lm_head.weight.get_value(), expected.lm_head.weight.get_value())


def test_whole_numbers_are_no_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].view(np.int32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"'{name}' is I32 .128, 64., expected BF16/F16/F32/F64 .128, 64."):
        load(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapters.safetensors"], "is an adapter of MLX's, which is not read"),
        (["config.json", "adapter/adapter_config.json"], "is a run of train.py: give .*adapter$"),
        (["config.json", "model.safetensors"], "is a model, no adapter: give it as --model"),
        (["adapter-f16.gguf"], "holds GGUF files for llama.cpp, no adapter of PEFT's"),
    ],
)
def test_what_is_no_adapter(files, words, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=words):
        read_adapter(tmp_path)
