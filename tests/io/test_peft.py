"""Adapter folders against PEFT itself, in both directions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.config import LoraSection
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.io.peft_config import from_peft, to_peft
from qlora_jax.io.peft_types import check_types
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.models.adapters import ADAPTER, add_adapters, linears
from tests.io.adapters import our_logits, our_model, with_random_adapter, written_by_peft
from tests.io.torch_model import load, logits

# PEFT asks transformers for what the latter is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


PEFT_SETTINGS = {
    "suffixes": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "full paths": dict(target_modules=["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj"]),
    "regex": dict(target_modules=r".*\.layers\.[12]\.mlp\.(gate|down)_proj"),
    "rank pattern": dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2, "layers.0.*q_proj": 6}),
    "alpha pattern": dict(target_modules=["q_proj", "o_proj"], alpha_pattern={r"layers\.1\.self_attn\.o_proj": 32}),
    "rslora": dict(target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"v_proj": 9}),
    "some layers": dict(target_modules=["q_proj"], layers_to_transform=[0, 2]),
    "excluded": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]),
    "output layer": dict(target_modules=["lm_head", "up_proj"]),
    "a name of another family": dict(target_modules=["query_key_value", "up_proj"]),
}


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_peft_writes_and_we_read(base, tmp_path, case):
    expected = written_by_peft(base, tmp_path, **PEFT_SETTINGS[case])
    adapter = read_adapter(tmp_path)
    model = our_model(base)
    assert attach_adapter(model, adapter, base_hash="of this base") == adapter.targets
    assert (adapter.base, adapter.base_hash) == (str(base), None)
    np.testing.assert_allclose(our_logits(model), expected, rtol=0, atol=2e-4)
    assert np.abs(logits(load(base)) - expected).max() > 0.1


def test_peft_settings_as_ours(base, tmp_path):
    written_by_peft(base, tmp_path, **PEFT_SETTINGS["rslora"], lora_dropout=0.25)
    adapter = read_adapter(tmp_path)
    assert adapter.lora == LoraSection(
        rank=4,
        alpha=8,
        dropout=0.25,
        targets=tuple(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]),
        variant="rslora",
        rank_pattern={"v_proj": 9},
    )
    name = "model.layers.2.self_attn."
    assert adapter.targets[f"{name}q_proj"] == Target(4, 4.0)
    assert adapter.targets[f"{name}v_proj"] == Target(9, 8 / 3)
    assert [matrix.shape for matrix in adapter.weights[f"{name}v_proj"]] == [(9, 64), (32, 9)]


def test_unequal_ranks_are_padded_with_zeros(base, tmp_path):
    written_by_peft(
        base, tmp_path, target_modules=["v_proj"], rank_pattern={"layers.1.*": 2}, layers_to_transform=[0, 1]
    )
    model = our_model(base)
    attach_adapter(model, read_adapter(tmp_path), base_hash=None)
    lora = dict(linears(model))["layers.self_attn.v_proj"].lora
    A, B = np.asarray(lora.A.get_value()), np.asarray(lora.B.get_value())
    assert (A.shape, B.shape) == ((3, 4, 64), (3, 32, 4))
    assert [np.abs(A[layer]).max(1).astype(bool).tolist() for layer in range(3)] == [
        [True] * 4,
        [True, True, False, False],
        [False] * 4,
    ]
    assert not B[1, :, 2:].any() and not B[2].any()
    np.testing.assert_array_equal(lora.scale.get_value(), np.float32([2, 4, 0]))
    assert [path for path, linear in linears(model) if linear.lora is not None] == ["layers.self_attn.v_proj"]


OUR_CONFIGS = {
    "all-linear": (
        LoraSection(rank=4),
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "suffixes": (LoraSection(rank=4, alpha=3, targets=("self_attn.q_proj", "v_proj")), ["q_proj", "v_proj"]),
    "regex": (
        LoraSection(rank=4, targets=r"model\.layers\.[02]\.mlp\.up_proj"),
        ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"],
    ),
    "rslora and patterns": (
        LoraSection(
            rank=4,
            targets=("q_proj", "up_proj"),
            variant="rslora",
            rank_pattern={"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            alpha_pattern={"up_proj": 5.5},
        ),
        ["q_proj", "up_proj"],
    ),
    "output layer": (LoraSection(rank=4, targets=("lm_head", "o_proj")), ["lm_head", "o_proj"]),
}


@pytest.mark.parametrize("case", OUR_CONFIGS)
def test_we_write_and_peft_reads(base, tmp_path, case):
    lora, target_modules = OUR_CONFIGS[case]
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn(str(base), "h", {"double": True}))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["target_modules"] == target_modules
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "a")
    loaded = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert loaded == set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    np.testing.assert_allclose(logits(theirs), our_logits(model), rtol=0, atol=2e-4)
    adapter = read_adapter(tmp_path / "a")
    assert (adapter.base_hash, adapter.extra, adapter.targets) == ("h", {"double": True}, targets)


def test_our_own_folder_gives_the_same_model(base, tmp_path):
    lora = LoraSection(rank=3, targets=("q_proj", "down_proj"), rank_pattern={"layers.2.*": 1})
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn(str(base), "h"))
    again = our_model(base)
    assert attach_adapter(again, read_adapter(tmp_path / "a"), base_hash="h") == targets
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, ADAPTER), nnx.state(model, ADAPTER))


def test_attaching_takes_an_earlier_adapters_place(base, plain):
    model, _ = with_random_adapter(base, LoraSection(rank=3, targets=("q_proj", "down_proj")))
    attach_adapter(model, read_adapter(plain), base_hash=None)
    adapted = {path: linear.lora.A.get_value().shape for path, linear in linears(model) if linear.lora is not None}
    assert adapted == {"layers.self_attn.q_proj": (3, 4, 64)}


def test_the_written_folder(base, tmp_path):
    lora = LoraSection(rank=2, alpha=16.0, dropout=0.1, targets=("q_proj",), rank_pattern={"layers.1.*": 1})
    model = our_model(base)
    targets = add_adapters(model, lora, jax.random.key(0))
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("org/llama", "0123", {"lm_head": False}))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "alpha_pattern": {},
        "base_model_name_or_path": "org/llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {"layers.1.*": 1},
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert (tmp_path / "a" / "adapter_config.json").read_text().startswith('{\n  "alpha_pattern": {},\n')
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert {name: (str(value.dtype), value.shape) for name, value in tensors.items()} == {
        f"{prefix}.0.self_attn.q_proj.lora_A.weight": ("float32", (2, 64)),
        f"{prefix}.0.self_attn.q_proj.lora_B.weight": ("float32", (64, 2)),
        f"{prefix}.1.self_attn.q_proj.lora_A.weight": ("float32", (1, 64)),
        f"{prefix}.1.self_attn.q_proj.lora_B.weight": ("float32", (64, 1)),
        f"{prefix}.2.self_attn.q_proj.lora_A.weight": ("float32", (2, 64)),
        f"{prefix}.2.self_attn.q_proj.lora_B.weight": ("float32", (64, 2)),
    }
    record = json.loads((tmp_path / "a" / "qlora_jax.json").read_text())
    assert record == {"base_hash": "0123", "lm_head": False}
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/llama\nlibrary_name: peft\n")
    assert "LoRA of rank 2, alpha 16, dropout 0.1, 640 parameters" in card
    modes = {file.stat().st_mode for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 1  # the safetensors library makes its own private to the user
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_overlapping_patterns_survive_the_sorting_of_keys(base, tmp_path):
    lora = LoraSection(rank=4, targets=("q_proj",), rank_pattern={r"z.*|model\.layers\.1.*": 3, "q_proj": 2})
    model, targets = with_random_adapter(base, lora)
    assert [target.rank for target in targets.values()] == [2, 3, 2]
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("b"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.2.self_attn.q_proj": 2,
    }
    assert read_adapter(tmp_path / "a").targets == targets
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "a")
    np.testing.assert_allclose(logits(theirs), our_logits(model), rtol=0, atol=2e-4)


def test_bfloat16_stays_bfloat16(base, tmp_path):
    model = our_model(base)
    lora = LoraSection(rank=2, targets=("q_proj",))
    targets = add_adapters(model, lora, jax.random.key(0), jnp.bfloat16)
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("b"))
    assert {m.dtype for pair in read_adapter(tmp_path / "a").weights.values() for m in pair} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_an_adapter_replaces_an_adapter_and_nothing_else(base, tmp_path):
    lora = LoraSection(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    out = tmp_path / "a"
    write_adapter(out, model, lora, targets, TrainedOn("first"))
    write_adapter(out, model, lora, targets, TrainedOn("second"))
    assert read_adapter(out).base == "second"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"a is not empty \(it holds 'thesis.txt'\): give a new or empty fold"):
        write_adapter(out, model, lora, targets, TrainedOn("third"))
    assert (out / "thesis.txt").read_text() == "years of work" and read_adapter(out).base == "second"
    with pytest.raises(FileExistsError, match="thesis.txt is a file: give a new or empty folder"):
        write_adapter(out / "thesis.txt", model, lora, targets, TrainedOn("third"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_targets_must_be_the_models(base, tmp_path):
    lora = LoraSection(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    more = targets | {"model.layers.0.mlp.up_proj": Target(2, 1.0)}
    with pytest.raises(ValueError, match="targets name 'model.layers.0.mlp.up_proj', which has no adapter"):
        write_adapter(tmp_path / "a", model, lora, more, TrainedOn("b"))


def test_patterns_that_cannot_be_read_again_are_written_as_names():
    """A user's own config may look around, which no adapter's file may."""
    modules = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj")]
    lora = LoraSection(rank=4, targets=r".*_proj", rank_pattern={r"(?<=0\.self_attn\.)q_proj": 8})
    targets = resolve_targets(lora, modules)
    settings = to_peft(lora, targets, modules, "base")
    assert settings["rank_pattern"] == {name: 8 if name == modules[0] else 4 for name in modules}
    check_types(Path("adapter_config.json"), settings)
    assert resolve_targets(from_peft(settings, modules), modules) == targets
