"""4-bit folders of which some projections are not packed, against transformers + bitsandbytes on the same folder."""

import dataclasses
import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from qlora_jax.config import Config, ModelSection, QuantSection
from qlora_jax.io.build import abstract_model
from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model, read_config
from qlora_jax.io.packing import all_packed, folder_forms, kept_names, stated_forms
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.lora.low_rank import Pair
from qlora_jax.memory.plan import plan
from qlora_jax.models.adapters import packed_projection
from qlora_jax.quant.mixed import MixedStack
from qlora_jax.quant.nf4 import NF4Tensor, quantize
from qlora_jax.quant.rules import packed, rules_for
from qlora_jax.training.setup import planned_forms
from tests.io.test_export import make_adapter
from tests.io.torch_model import TOKENS, load, logits

# What is left in 16 bits, as transformers' llm_int8_skip_modules says it.
SKIPPED = {
    "some layers": ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn"],
    "the first layer": ["lm_head", "model.layers.0"],
    "one projection": ["lm_head", "q_proj"],
    "nothing, not even the output layer": ["none"],
}


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """`folders(name)`: the base as transformers packs it with these modules skipped, made once."""
    made = {}

    def get(name):
        if name not in made:
            settings = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=SKIPPED[name],
            )
            made[name] = tmp_path_factory.mktemp("mixed")
            model = load(base, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu")
            model.save_pretrained(made[name])
        return made[name]

    return get


def weights_of(folder):
    """float32 logits with the very weights that bitsandbytes unpacks; its product on a CPU is less exact."""
    return logits(load(folder, dtype="auto", device_map="cpu").dequantize().float())


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("quant", ["auto", "qlora", "none"])
def test_logits_are_those_of_transformers(folders, name, quant):
    model = load_model(
        folders(name), dtype="float32", rules=packed(QuantSection()) if quant == "qlora" else rules_for(quant)
    ).model
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), weights_of(folders(name)), atol=2e-5)
    mixed = isinstance(model.layers.mlp.down_proj.weight.get_value(), MixedStack)
    assert mixed == (quant != "none" and name in ("some layers", "the first layer"))


def test_nf4_packs_the_rest_like_the_others_and_says_so(folders, base, caplog):
    caplog.set_level(logging.INFO, "qlora_jax.io")
    model = load_model(folders("some layers"), dtype="float32", rules=rules_for("nf4")).model
    weight = load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    stack = model.layers.mlp.down_proj.weight.get_value()
    assert isinstance(stack, NF4Tensor) and stack.dtype == "bfloat16"
    np.testing.assert_array_equal(stack[1].codes, quantize(jnp.asarray(weight)).codes)
    assert "keeps 5 of 21 projections unpacked, packed in NF4 now: " in caplog.text
    assert "model.layers.1.mlp.down_proj" in caplog.text
    caplog.clear()
    load_model(folders("some layers"), dtype="float32", rules=rules_for("auto"))
    assert "they stay so" in caplog.text
    caplog.clear()
    load_model(folders("nothing, not even the output layer"), dtype="float32", rules=rules_for("nf4"))
    assert not caplog.text


def test_the_merge_into_what_training_saw_leaves_what_the_folder_keeps(folders, base, tmp_path):
    adapter = make_adapter()
    empty = dataclasses.replace(adapter, weights={n: Pair(a * 0, b) for n, (a, b) in adapter.weights.items()})
    export_merged(folders("some layers"), empty, tmp_path / "out", into="dequantized")
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    names = {f"{name}.weight" for name in kept_names(read_config(base), forms(folders("some layers")))}
    for name, value in written.items():
        assert np.array_equal(value, original[name]) == (name in names or "_proj" not in name), name
    with pytest.raises(ValueError, match="in 4 bits, not its original: give the folder of the original weights"):
        export_merged(folders("some layers"), adapter, tmp_path / "no")
    with pytest.raises(ValueError, match="holds 4-bit weights already"):
        export_bnb4(folders("some layers"), tmp_path / "no")


def forms(folder):
    return folder_forms(read_config(folder), TensorFolder(folder))


def test_forms(folders, base):
    assert forms(base) == {}
    some, config = forms(folders("some layers")), read_config(base)
    assert kept_names(config, some) == [
        *(f"model.layers.2.self_attn.{p}_proj" for p in "qkvo"),
        "model.layers.1.mlp.down_proj",
    ]
    assert (
        not kept_names(config, all_packed(some))
        and len({f for layers in all_packed(some).values() for f in layers}) == 1
    )


def test_a_plan_counts_what_the_folder_keeps(folders):
    def planned(name):
        folder = str(folders(name))
        model = ModelSection(path=folder, geometry=folder, dtype="bf16")
        return plan(Config(output_dir="", model=model), read_config(folders(name)))

    some, every = planned("some layers"), planned("nothing, not even the output layer")
    kept = (64 * 64 * 2 + 32 * 64 * 2 + 64 * 128) * 2
    assert some.parts()["weights"] == kept and every.parts().get("weights", 0) == 0
    assert some.parts()["codes"] == every.parts()["codes"] - kept / 4


@pytest.mark.parametrize("name", SKIPPED)
def test_a_configuration_alone_says_the_same(name, folders):
    settings = json.loads((folders(name) / "config.json").read_text())
    assert stated_forms(read_config(folders(name)), settings) == forms(folders(name))
    assert stated_forms(read_config(folders(name)), {}) == {}


def test_what_is_served_is_known_by_any_projection(folders):
    assert packed_projection(
        load_model(folders("one projection"), dtype="float32", rules=rules_for("auto")).model
    ).double
    assert (
        packed_projection(load_model(folders("one projection"), dtype="float32", rules=rules_for("none")).model) is None
    )


def test_a_plan_of_a_configuration_alone(folders, tmp_path):
    shutil.copyfile(folders("some layers") / "config.json", tmp_path / "config.json")
    geometry = read_config(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        config = Config(output_dir="", model=ModelSection(geometry=str(source), dtype="bf16"))
        assert planned_forms(config, geometry) == forms(folders("some layers"))
    assert planned_forms(Config(output_dir="", method="lora", model=config.model), geometry) == {}


def test_shapes_are_those_of_the_loaded_model(folders):
    import jax
    from flax import nnx

    folder = folders("the first layer")
    loaded = load_model(folder, dtype="float32", rules=packed(QuantSection())).model
    shapes = abstract_model(loaded.config, dtype="float32", rules=packed(QuantSection()), forms=forms(folder))
    ours, theirs = (jax.tree.leaves_with_path(nnx.state(model)) for model in (loaded, shapes))
    assert [(p, a.shape, a.dtype) for p, a in ours] == [(p, a.shape, a.dtype) for p, a in theirs]
