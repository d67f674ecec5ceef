"""Configurations and checkpoints that no family can be: one error that names what is wrong, and little work."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.hf import load_model, open_folder
from qlora_jax.io.model_config import parse_config
from qlora_jax.models.families import FAMILIES, WRAPPERS

pytest.importorskip("torch")


def settings(folder, change, of_text=False):
    """config.json with fields changed, perhaps those of the text part."""
    found = json.loads((folder / "config.json").read_text())
    (found["text_config"] if of_text else found).update(change)
    return found


def test_an_unknown_family_is_named_with_its_class_and_the_known_ones(checkpoint):
    change = dict(model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    with pytest.raises(NotImplementedError) as error:
        parse_config(settings(checkpoint("llama"), change))
    words = str(error.value)
    assert "'nonesuch' (NonesuchForCausalLM)" in words
    assert all(name in words for name in (*FAMILIES, *WRAPPERS))


# (checkpoint, fields, what the error says)
UNKNOWN = {
    "layers": ("gemma3_text", dict(layer_types=["full_attention"] * 6 + ["chunked_attention"]), "chunked_attention"),
    "rope": ("llama", dict(rope_parameters=dict(rope_type="spiral", rope_theta=1e4)), "rope_type 'spiral'"),
    "activation": ("olmo2", dict(hidden_act="relu6"), "hidden_act 'relu6'"),
    "experts' activation": ("qwen3_moe", dict(hidden_act="relu6"), "hidden_act 'relu6'"),
    "Mamba": ("granite4_dense", dict(layer_types=["attention", "mamba", "attention"]), "granitemoehybrid.*Mamba"),
    "experts": ("granite4_dense", dict(num_local_experts=8), "granitemoehybrid: num_local_experts=8"),
}


@pytest.mark.filterwarnings("ignore:Missing validation function")
@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_option_of_a_known_family_is_named(checkpoint, case):
    name, change, words = UNKNOWN[case]
    with pytest.raises(NotImplementedError, match=words):
        parse_config(settings(checkpoint(name), change))


EXPERTS = {
    "qwen3_moe": "num_local_experts",
    "mixtral": "num_local_experts",
    "olmoe": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "glm4_moe": "n_routed_experts",
}
IMPOSSIBLE = {
    "heads": ("phi3", dict(num_key_value_heads=3), "num_attention_heads=4 must be a multiple"),
    "odd heads": ("qwen3_moe", dict(head_dim=31), "head_dim"),
    "no heads": ("smollm3", dict(num_attention_heads=0), "num_attention_heads is 0"),
    "partly rotated": (
        "glm4",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=7)),
        "112 dimensions are rotated .partial_rotary_factor., a head has 16",
    ),
    **{f"few of {name}": (name, {field: 1}, "goes to 2 of 1 experts") for name, field in EXPERTS.items()},
    **{f"none of {name}": (name, {field: 0}, "experts: 0, expected") for name, field in EXPERTS.items()},
    **{f"no choice of {name}": (name, dict(num_experts_per_tok=0), "goes to 0 of 8") for name in EXPERTS},
    **{f"huge {name}": (name, {field: 10**9}, "layers of 1,000,000,000 experts") for name, field in EXPERTS.items()},
    "empty experts": ("qwen3_moe", dict(moe_intermediate_size=0), "projections: 0, expected"),
    "empty shared experts": ("qwen2_moe", dict(shared_expert_intermediate_size=-1), "shared_expert of -1 elements"),
    "groups": ("glm4_moe", dict(n_group=3), "1 of 3 groups .topk_group, n_group. cannot be chosen"),
    "sparse steps": ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step is 0"),
    "scores": ("gemma2", dict(query_pre_attn_scalar=-1), "query_pre_attn_scalar is -1"),
    "logits": ("granite", dict(logits_scaling=0), "logits_scaling is 0"),
    "positions": ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers has 1 entries, expected one for each of 4"),
    "thetas": ("granite_swa", dict(layer_rope_theta=[1.0]), "layer_rope_theta has 1 entries"),
    "layers": ("exaone4", dict(layer_types=["full_attention"]), "layer_types"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_sizes_that_cannot_be_are_named(checkpoint, case):
    name, change, words = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=words) as error:
        parse_config(settings(checkpoint(name), change))
    assert "\n" not in str(error.value)


INSIDE = {
    "unknown": ("mistral3", dict(model_type="nonesuch"), "nonesuch"),
    "other": (
        "mistral3",
        dict(model_type="cohere2"),
        "mistral3 with text of 'cohere2' is not supported, only",
    ),
    "lenders": ("gemma4_e", dict(num_kv_shared_layers=8), "num_kv_shared_layers is 8: no sliding_attention layer"),
    "own inputs": ("gemma4_e", dict(hidden_size_per_layer_input=-3), "hidden_size_per_layer_input is -3"),
    "top_k": ("gemma4_moe", dict(top_k_experts=9), "goes to 9 of 8 experts"),
    "odd heads": ("gemma4", dict(per_layer_config={"5": dict(head_dim=31)}), "head_dim=31"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_what_is_wrong_with_a_text_part_is_named(checkpoint, case):
    name, change, words = INSIDE[case]
    with pytest.raises((ValueError, NotImplementedError), match=words):
        parse_config(settings(checkpoint(name), change, of_text=True))


@pytest.mark.parametrize("value", [None, [1], "x", 7])
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_vl"])
def test_a_text_part_is_an_object(checkpoint, name, value):
    with pytest.raises(ValueError, match="text_config is .*, expected an object"):
        parse_config(settings(checkpoint(name), dict(text_config=value)))


@pytest.fixture
def changed(checkpoint, tmp_path):
    """`changed(name, change)`: a copy of a checkpoint whose tensors a function has changed."""

    def make(name, change):
        shutil.copytree(checkpoint(name), folder := tmp_path / name)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder

    return make


OTHER = ["model.layers.0.mlp.extra.weight", "foo.weight"]


@pytest.mark.parametrize("name", ["granite", "gemma3_model_first", "glm4_moe_mtp", "qwen2_5_vl"])
def test_tensors_that_nobody_uses_are_listed_and_refused(changed, name):
    def add(tensors):
        return {**tensors, **{other: next(iter(tensors.values())) for other in OTHER}}

    with pytest.raises(ValueError, match="holds 2 tensors that no .* has: foo.weight, model.layers.0.mlp.extra"):
        open_folder(changed(name, add))


def test_towers_are_passed_only_in_models_that_have_them(changed):
    def add(tensors):
        return {**tensors, "model.vision_tower.extra.weight": next(iter(tensors.values()))}

    open_folder(changed("gemma3_model_first", add))
    with pytest.raises(ValueError, match="holds 1 tensors that no granite decoder has: model.vision_tower.extra"):
        open_folder(changed("granite", add))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("gemma3", "language_model.model.layers.2.self_attn.q_norm.weight"),
        ("gemma3_model_first", "model.language_model.layers.2.self_attn.q_norm.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight"),
        ("qwen3_moe_fused", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_missing_tensor_is_named(changed, name, lost):
    def drop(tensors):
        return {one: value for one, value in tensors.items() if one != lost}

    with pytest.raises(ValueError, match=f"lacks 1 of .* tensors, '{lost}' first"):
        open_folder(changed(name, drop))


@pytest.mark.parametrize("name", ["qwen3_moe_fused", "gpt_oss", "mixtral"])
def test_experts_of_another_shape_are_named(changed, name):
    def cut(tensors):
        return {one: x[:-1] if ".experts." in one and x.ndim > 1 else x for one, x in tensors.items()}

    with pytest.raises(ValueError, match=r"experts.* is BF16 .*, expected "):
        load_model(changed(name, cut), dtype="float32")
