"""Adapters as scripts and PEFT's own options save them, against PEFT's logits on the same base."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import attach_adapter, read_adapter
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.quant.rules import rules_for
from tests.io.adapters import our_logits, our_model
from tests.io.torch_model import TOKENS, load, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of output layers, whether they are tied or saved whole
]

WEIGHTS = "adapter_model.safetensors"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def saved_by_peft(base, folder, *, options=None, **settings) -> np.ndarray:
    """An adapter as PEFT saves it by itself; the logits of what PEFT loads from it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or ("lora_B" in name and settings.get("init_lora_weights") != "mica"):
                weight.normal_(0, 0.3)
    model.save_pretrained(folder, **(options or {}))
    return logits(peft.PeftModel.from_pretrained(load(base), folder))


def with_adapter(base, folder) -> np.ndarray:
    model = our_model(base)
    attach_adapter(model, read_adapter(folder, TensorFolder(base)), base_hash=None)
    return our_logits(model)


def rewrite(folder, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


SAVED = {
    "an output layer": dict(target_modules=["q_proj", "lm_head"]),
    "an output layer alone": dict(target_modules=["lm_head"]),
    "an output layer, without the whole one": dict(
        target_modules=["q_proj", "lm_head"], options={"save_embedding_layers": False}
    ),
    "whole embeddings": dict(target_modules=["q_proj"], options={"save_embedding_layers": True}),
    "mica": dict(target_modules=["q_proj", "v_proj"], init_lora_weights="mica"),
}


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("case", SAVED)
def test_as_peft_saves_them(case, family, checkpoint, tmp_path):
    base = checkpoint(family)
    expected = saved_by_peft(base, tmp_path / "a", **SAVED[case])
    np.testing.assert_allclose(with_adapter(base, tmp_path / "a"), expected, atol=2e-4)
    assert np.abs(logits(load(base)) - expected).max() > 0.05


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapted_output_layer_is_merged_and_packed(family, checkpoint, tmp_path):
    base = checkpoint(family)
    expected = saved_by_peft(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    adapter = read_adapter(tmp_path / "a", TensorFolder(base))
    export_merged(base, adapter, tmp_path / "merged")
    np.testing.assert_allclose(logits(load(tmp_path / "merged")), expected, atol=2e-4)
    export_bnb4(base, tmp_path / "packed", adapter)
    ours, theirs = our_model(tmp_path / "packed"), load(tmp_path / "packed", dtype="auto", device_map="cpu")
    np.testing.assert_allclose(ours(jnp.asarray(TOKENS)), logits(theirs.dequantize().float()), atol=2e-4)


KEYS = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile around all": lambda key: f"_orig_mod.{key}",
    "sharding": lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
}


@pytest.mark.parametrize("how", KEYS)
def test_other_keys(how, base, tmp_path):
    expected = saved_by_peft(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path / "a", lambda tensors: {KEYS[how](key): value for key, value in tensors.items()})
    assert A0 not in load_file(tmp_path / "a" / WEIGHTS)
    np.testing.assert_allclose(with_adapter(base, tmp_path / "a"), expected, atol=2e-4)


def test_64_bits(base, tmp_path):
    expected = saved_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    rewrite(tmp_path / "a", lambda tensors: {key: value.astype(np.float64) for key, value in tensors.items()})
    np.testing.assert_allclose(with_adapter(base, tmp_path / "a"), expected, atol=2e-4)
    assert read_adapter(tmp_path / "a").weights["model.layers.0.self_attn.q_proj"][0].dtype == np.float32


@pytest.fixture(scope="module")
def with_head(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "head"
    saved_by_peft(base, folder, target_modules=["q_proj", "lm_head"])
    return folder


def refused(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy, change)
    return copy


def test_the_base_in_another_dtype_is_the_base(with_head, checkpoint, base):
    assert "base_model.model.lm_head.base_layer.weight" in load_file(with_head / WEIGHTS)
    for folder in (base, checkpoint()):
        read_adapter(with_head, TensorFolder(folder))


WHOLE = "base_model.model.lm_head.base_layer.weight"
REFUSED = {
    "another output layer": (lambda t: t | {WHOLE: t[WHOLE] * 2}, "is another lm_head than the base's: it was trained"),
    "a resized one": (
        lambda t: t | {WHOLE: t[WHOLE][:100]},
        r"\(100, 64\) is another lm_head than the base's.*resized",
    ),
    "an unknown layer": (
        lambda t: t | {"base_model.model.score.weight": t[A0]},
        "'base_model.model.score.weight' is no",
    ),
    "no prefix": (
        lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
        "tensor 'lm_head.*' is not",
    ),
    "an embedding's": (
        lambda t: t | {A0.replace("lora_A.weight", "lora_embedding_A"): t[A0]},
        "lora_embedding_A' is no",
    ),
    "twice": (lambda t: t | {A0.replace(".weight", ".default.weight"): t[A0]}, "holds lora_A of .*q_proj' twice"),
    "several adapters": (lambda t: named(t), r"holds several adapters \(a, b\): save one"),
}


def named(tensors):
    """With the adapter's name in every key: another one in the first layer."""
    names = {key: key.replace(".weight", ".a.weight" if "layers.0" in key else ".b.weight") for key in tensors}
    return {names[key] if "lora_" in key else key: value for key, value in tensors.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case, with_head, base, tmp_path):
    change, words = REFUSED[case]
    with pytest.raises((ValueError, NotImplementedError), match=words):
        read_adapter(refused(with_head, tmp_path, change), TensorFolder(base))


def test_a_whole_layer_needs_the_base_to_compare_with(with_head):
    with pytest.raises(NotImplementedError, match="is a whole layer, which is not supported here: merge the adapter"):
        read_adapter(with_head)


def test_an_adapter_of_the_bare_model(base, tmp_path):
    saved_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    rewrite(tmp_path / "a", lambda tensors: {k.replace(".model.model.", ".model."): v for k, v in tensors.items()})
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    with pytest.raises(
        ValueError, match=r"'layers.0.self_attn.q_proj' \(it was trained on the model without its output"
    ):
        attach_adapter(our_model(base), read_adapter(tmp_path / "a"), base_hash=None)


def test_a_packed_base_keeps_its_adapted_output_layer(checkpoint, tmp_path):
    """As with the base unpacked, but for what NF4 loses."""
    base = checkpoint("llama-tied")
    saved_by_peft(base, tmp_path / "a", target_modules=["lm_head"])
    model = load_model(base, dtype="float32", rules=rules_for("nf4")).model
    hidden = model.hidden(jnp.asarray(TOKENS))
    attach_adapter(model, read_adapter(tmp_path / "a", TensorFolder(base)), base_hash=None)
    unpacked = our_model(base)
    attach_adapter(unpacked, read_adapter(tmp_path / "a", TensorFolder(base)), base_hash=None)
    np.testing.assert_allclose(model.logits(hidden), unpacked.logits(hidden), atol=1e-4)
