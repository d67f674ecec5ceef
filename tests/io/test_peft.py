"""Adapter folders against PEFT itself, in both directions."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import Adapter, attach_adapter, read_adapter, write_adapter
from qlora_jax.lora import LoraConfig, Target, resolve_targets
from qlora_jax.models.adapters import ADAPTER, add_adapters, linears
from qlora_jax.models.parameters import linear_modules
from tests.io.torch_model import TOKENS, load, logits

# PEFT asks transformers for what the latter is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def written_by_peft(base, folder, **settings):
    """An adapter of PEFT's with random A and B in `folder`; its logits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    # By default PEFT adds the whole output layer where it is adapted.
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def our_model(base):
    return load_model(base, dtype="float32", quant="none").model


def our_logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(TOKENS, jnp.int32)))


def with_random_adapter(base, lora):
    """Our model with random A and B, and its targets."""
    model, random = our_model(base), np.random.default_rng(0)
    shapes = {f"{name}_proj": (64, 64) for name in "qo"} | {f"{name}_proj": (32, 64) for name in "kv"}
    shapes |= {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128), "lm_head": (160, 64)}
    weights = {}
    for name, target in resolve_targets(lora, linear_modules(model.config)).items():
        n, k = shapes[name.rsplit(".", 1)[-1]]
        A, B = random.normal(0, 0.3, (target.rank, k)), random.normal(0, 0.3, (n, target.rank))
        weights[name] = (A.astype(np.float32), B.astype(np.float32))
    adapter = Adapter(lora=lora, weights=weights, base=None, base_hash=None, extra={})
    return model, attach_adapter(model, adapter, base_hash=None)


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
    assert adapter.lora == LoraConfig(
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
        LoraConfig(rank=4),
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "suffixes": (LoraConfig(rank=4, alpha=3, targets=("self_attn.q_proj", "v_proj")), ["q_proj", "v_proj"]),
    "regex": (
        LoraConfig(rank=4, targets=r"model\.layers\.[02]\.mlp\.up_proj"),
        ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"],
    ),
    "rslora and patterns": (
        LoraConfig(
            rank=4,
            targets=("q_proj", "up_proj"),
            variant="rslora",
            rank_pattern={"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            alpha_pattern={"up_proj": 5.5},
        ),
        ["q_proj", "up_proj"],
    ),
    "output layer": (LoraConfig(rank=4, targets=("lm_head", "o_proj")), ["lm_head", "o_proj"]),
}


@pytest.mark.parametrize("case", OUR_CONFIGS)
def test_we_write_and_peft_reads(base, tmp_path, case):
    lora, target_modules = OUR_CONFIGS[case]
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, base=str(base), base_hash="h", extra={"double": True})
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["target_modules"] == target_modules
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "a")
    loaded = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert loaded == set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    np.testing.assert_allclose(logits(theirs), our_logits(model), rtol=0, atol=2e-4)
    adapter = read_adapter(tmp_path / "a")
    assert (adapter.base_hash, adapter.extra, adapter.targets) == ("h", {"double": True}, targets)


def test_our_own_folder_gives_the_same_model(base, tmp_path):
    lora = LoraConfig(rank=3, targets=("q_proj", "down_proj"), rank_pattern={"layers.2.*": 1})
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, base=str(base), base_hash="h")
    again = our_model(base)
    assert attach_adapter(again, read_adapter(tmp_path / "a"), base_hash="h") == targets
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, ADAPTER), nnx.state(model, ADAPTER))


def test_attaching_takes_an_earlier_adapters_place(base, plain):
    model, _ = with_random_adapter(base, LoraConfig(rank=3, targets=("q_proj", "down_proj")))
    attach_adapter(model, read_adapter(plain), base_hash=None)
    adapted = {path: linear.lora.A.get_value().shape for path, linear in linears(model) if linear.lora is not None}
    assert adapted == {"layers.self_attn.q_proj": (3, 4, 64)}


def test_the_written_folder(base, tmp_path):
    lora = LoraConfig(rank=2, alpha=16.0, dropout=0.1, targets=("q_proj",), rank_pattern={"layers.1.*": 1})
    model = our_model(base)
    targets = add_adapters(model, lora, jax.random.key(0))
    write_adapter(tmp_path / "a", model, lora, targets, base="org/llama", base_hash="0123", extra={"lm_head": False})
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
    lora = LoraConfig(rank=4, targets=("q_proj",), rank_pattern={r"z.*|model\.layers\.1.*": 3, "q_proj": 2})
    model, targets = with_random_adapter(base, lora)
    assert [target.rank for target in targets.values()] == [2, 3, 2]
    write_adapter(tmp_path / "a", model, lora, targets, base="b", base_hash=None)
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
    lora = LoraConfig(rank=2, targets=("q_proj",))
    targets = add_adapters(model, lora, jax.random.key(0), jnp.bfloat16)
    write_adapter(tmp_path / "a", model, lora, targets, base="b", base_hash=None)
    assert {m.dtype for pair in read_adapter(tmp_path / "a").weights.values() for m in pair} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_an_adapter_replaces_an_adapter_and_nothing_else(base, tmp_path):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    out = tmp_path / "a"
    write_adapter(out, model, lora, targets, base="first", base_hash=None)
    write_adapter(out, model, lora, targets, base="second", base_hash=None)
    assert read_adapter(out).base == "second"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"a is not empty \(it holds 'thesis.txt'\): give a new or empty fold"):
        write_adapter(out, model, lora, targets, base="third", base_hash=None)
    assert (out / "thesis.txt").read_text() == "years of work" and read_adapter(out).base == "second"
    with pytest.raises(FileExistsError, match="thesis.txt is a file: give a new or empty folder"):
        write_adapter(out / "thesis.txt", model, lora, targets, base="third", base_hash=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_targets_must_be_the_models(base, tmp_path):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    more = targets | {"model.layers.0.mlp.up_proj": Target(2, 1.0)}
    with pytest.raises(ValueError, match="targets name 'model.layers.0.mlp.up_proj', which has no adapter"):
        write_adapter(tmp_path / "a", model, lora, more, base="b", base_hash=None)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """An adapter of PEFT's on q_proj, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    written_by_peft(base, folder, target_modules=["q_proj"])
    return folder


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
    "target_parameters": (["x"], r"target_parameters=\['x'\] is not supported"),
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
    with pytest.raises(NotImplementedError, match=r"lm_head.* \(PEFT's save_pretrained\(save_embedding_layers=False\)"):
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
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    write_adapter(tmp_path / "a", model, lora, targets, base="org/other", base_hash="aaaa")
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
