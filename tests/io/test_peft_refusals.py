"""What is refused of an adapter folder, with what words."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraSection
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.models.adapters import linears
from tests.io.adapters import our_model, with_random_adapter, written_by_peft

# PEFT asks transformers for what the latter is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def damaged(plain, tmp_path, *, settings=None, tensors=None, drop=()):
    folder = shutil.copytree(plain, tmp_path / "damaged")
    values = json.loads((folder / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
    values = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    values = {k: v for k, v in values.items() if k not in drop}
    save_file(values, folder / "adapter_model.safetensors")
    return folder


UNSUPPORTED = {
    "use_dora": (True, "use_dora=True is not supported, only LoRA and rsLoRA on linear layers are"),
    "bias": ("all", "bias='all' is not supported"),
    "modules_to_save": (["lm_head"], r"modules_to_save=\['lm_head'\] is not supported"),
    "peft_type": ("LOHA", "peft_type 'LOHA' is not supported, only 'LORA'"),
    "lora_bias": (True, "lora_bias=True is not supported"),
    "target_parameters": (["mlp.gate.weight"], "target_parameters names 'mlp.gate.weight', a router or another array"),
    "init_lora_weights": (
        "pissa",
        "init_lora_weights='pissa' changes the base model's weights: convert the adapt",
    ),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_refuses_other_methods(plain, tmp_path, key):
    value, message = UNSUPPORTED[key]
    with pytest.raises(NotImplementedError, match=message):
        read_adapter(damaged(plain, tmp_path, settings={key: value}))


def test_refuses_dora_and_embeddings_of_peft(base, tmp_path):
    written_by_peft(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(NotImplementedError, match="use_dora=True is not supported"):
        read_adapter(tmp_path / "dora")
    written_by_peft(base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(NotImplementedError, match="embed_tokens.* is not supported, only lora_A and lora_B of linear"):
        read_adapter(tmp_path / "embedding")


def test_refuses_whole_layers(plain, tmp_path):
    whole = {"base_model.model.lm_head.base_layer.weight": np.zeros((160, 64), np.float32)}
    with pytest.raises(NotImplementedError, match="lm_head.* is a whole layer, which is not supported here: merge"):
        read_adapter(damaged(plain, tmp_path, tensors=whole))


def test_refuses_what_is_not_there(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder: give one with an adapter of PEFT's"):
        read_adapter(tmp_path / "nowhere")
    folder = shutil.copytree(plain, tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="a holds no adapter_config.json: give a folder with an adapter"):
        read_adapter(folder)
    folder = shutil.copytree(plain, tmp_path / "b")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b holds no adapter_model.safetensors: give a folder with an ada"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle, which can run code when it is read: save"):
        read_adapter(folder)


def test_refuses_damaged_files(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "a")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match=rf"\({len(content) - 8} bytes\) is truncated or no safetensors file"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is no JSON .*: save the adapter again"):
        read_adapter(folder)


def test_refuses_a_missing_setting(plain, tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json lacks 'lora_alpha': save the adapter again"):
        read_adapter(damaged(plain, tmp_path, drop=("lora_alpha",)))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_refuses_weights_that_are_not_finite(plain, tmp_path, bad):
    A = load_file(plain / "adapter_model.safetensors")[A0]
    A[1, 5] = bad
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.lora_A.weight' holds NaN or infinite values"):
        read_adapter(damaged(plain, tmp_path, tensors={A0: A}))


def test_refuses_ranks_that_do_not_fit(plain, tmp_path):
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has A \(3, 64\) and B \(64, 4\), but "):
        read_adapter(damaged(plain, tmp_path, tensors={A0: np.zeros((3, 64), np.float32)}))


def test_refuses_other_tensors(plain, tmp_path):
    with pytest.raises(ValueError, match=r"lora_A.weight' is int32 \(4, 64\), expected a float32, float16 or bfloat"):
        read_adapter(damaged(plain, tmp_path, tensors={A0: np.zeros((4, 64), np.int32)}))


def test_refuses_half_a_pair_and_weights_beside_the_targets(plain, tmp_path):
    with pytest.raises(ValueError, match="holds lora_B of 'model.layers.0.self_attn.q_proj' without its counterpart"):
        read_adapter(damaged(plain, tmp_path / "a", drop=(A0,)))
    with pytest.raises(ValueError, match="has weights for 'model.layers.0.self_attn.q_proj', which target_modules i"):
        read_adapter(damaged(plain, tmp_path / "b", settings={"target_modules": ["v_proj"]}))


def test_refuses_another_base(base, tmp_path):
    lora = LoraSection(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("org/other", "aaaa"))
    with pytest.raises(ValueError, match="adapter for another base: .* 'org/other' .* aaaa, this base has bbbb: give"):
        attach_adapter(our_model(base), read_adapter(tmp_path / "a"), base_hash="bbbb")


def test_refuses_a_model_that_it_does_not_fit(plain, checkpoint):
    adapter = read_adapter(plain)
    with pytest.raises(ValueError, match=r"lora_A of 'model.layers.0.self_attn.q_proj' is \(4, 64\), this model nee.*"):
        attach_adapter(our_model(checkpoint(hidden_size=128)), adapter, base_hash=None)
    with pytest.raises(ValueError, match="weights for 'model.layers.2.self_attn.q_proj', which this llama model of 2"):
        attach_adapter(our_model(checkpoint(num_hidden_layers=2)), adapter, base_hash=None)
    model = our_model(checkpoint(num_hidden_layers=4))
    with pytest.raises(ValueError, match="cover 'model.layers.3.self_attn.q_proj', for which it has no weights"):
        attach_adapter(model, adapter, base_hash=None)
    assert all(linear.lora is None for _, linear in linears(model))
