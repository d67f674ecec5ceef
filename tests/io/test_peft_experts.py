"""Adapters of experts beside PEFT: what is written loads there and computes the same, and what PEFT writes is read."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.config import LoraSection
from qlora_jax.io.export import DEFAULT, export_merged
from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.models.adapters import add_adapters, linears
from qlora_jax.quant.rules import UNPACKED
from tests.families.checkpoints import load, read_reference

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# PEFT asks transformers for what the latter is about to rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It looks for the modules of a pattern alone, and then takes it for parameters, too.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
FORMER = ("gate_proj", "up_proj", "down_proj")
LENGTH = 12


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's threads wait for each other by spinning, which is slow where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder, rules=UNPACKED, **lora):
    """Our model with an adapter whose B is not zero, the section, and the adapted modules."""
    model, section = load_model(folder, dtype="float32", rules=rules).model, LoraSection(**lora)
    targets = add_adapters(model, section, jax.random.key(0))
    for number, (_, linear) in enumerate(linears(model)):
        if linear.lora is not None:
            B = linear.lora.B.get_value()
            linear.lora.B.set_value(0.3 * jax.random.normal(jax.random.key(number), B.shape))
    return model, section, targets


def written(folder, out, rules=UNPACKED, **lora):
    """Such an adapter in the folder `out`, and our logits."""
    model, section, targets = trained(folder, rules, **lora)
    write_adapter(out, model, section, targets, TrainedOn(str(folder)))
    return logits(model, folder)


def tokens_of(folder):
    return read_reference(folder).tokens[:1, :LENGTH]


def logits(model, folder):
    """Ours."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens_of(folder), jnp.int32)))


def their_logits(model, folder):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tokens_of(folder))).logits.float().numpy()


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def close(actual, expected, share=3e-5):
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


def loaded_by_peft(folder, adapter):
    """PEFT's model of an adapter, every tensor of which has found its place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(load(folder), adapter)
    words = [str(warning.message) for warning in caught]
    assert not [text for text in words if "issing" in text or "nexpected" in text or "not found" in text]
    held = load_file(adapter / "adapter_model.safetensors")
    assert len(held) == len([name for name in model.state_dict() if "lora_" in name])
    return model


def loaded_strictly(folder):
    """transformers' model, which has found every tensor, and no other one."""
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model, found = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(found.values())
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "gemma4_moe", "qwen3_5_moe"])
def test_peft_computes_the_same_and_so_does_the_merged_model(family, tmp_path, name):
    base, adapter = family(name), tmp_path / "adapter"
    ours = written(base, adapter, rank=2, alpha=4, targets=("q_proj", *EXPERTS))
    close(their_logits(loaded_by_peft(base, adapter), base), ours)
    assert np.abs(ours - read_reference(base).logits[:1, :LENGTH]).max() > 0.1 * np.abs(ours).max()

    export_merged(base, read_adapter(adapter), tmp_path / "merged", dtype="float32")
    close(their_logits(loaded_strictly(tmp_path / "merged"), base), ours)


def test_gradients(family, tmp_path):
    base = family("qwen3_moe")
    model, section, targets = trained(base, rank=2, targets=("v_proj", *EXPERTS))
    write_adapter(tmp_path / "adapter", model, section, targets, TrainedOn(str(base)))
    toward = np.random.default_rng(0).standard_normal((1, LENGTH, model.config.vocab_size)).astype(np.float32)

    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    (theirs(input_ids=torch.tensor(tokens_of(base))).logits * torch.tensor(toward)).sum().backward()
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }

    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def value(adapters):
        whole = nnx.merge(graphdef, adapters, rest)
        return jnp.vdot(whole(jnp.asarray(tokens_of(base), jnp.int32)), toward)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(value))(adapters)
    # Gradients lie as the arrays that they belong to, in our model and in PEFT's files.
    write_adapter(tmp_path / "gradients", nnx.merge(graphdef, found, rest), section, targets, TrainedOn(str(base)))
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert ours.keys() == expected.keys() and len(ours) == 3 * 2 * model.config.num_layers
    for name, array in ours.items():
        assert np.abs(array).max() > 0
        close(array, expected[name], 1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe_fused", "gpt_oss_mxfp4"])
def test_other_layouts_of_checkpoints_are_merged(family, tmp_path, name):
    base, into = family(name), "dequantized" if "mxfp4" in name else "original"
    rules = DEFAULT if into == "dequantized" else UNPACKED
    ours = written(base, tmp_path / "adapter", rules, rank=2, targets=EXPERTS)
    export_merged(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged", into=into, dtype="float32")
    close(their_logits(loaded_strictly(tmp_path / "merged"), base), ours)


def test_ranks_and_layers_of_their_own(family, tmp_path):
    base = family("qwen3_moe")
    down, last = "model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"
    ours = written(
        base,
        tmp_path,
        rank=2,
        targets=("v_proj", down, last, "model.layers.1.mlp.experts.down_proj"),
        rank_pattern={"gate_up_proj": 3, r"layers\.1\..*down_proj": 1},
        alpha_pattern={"v_proj": 5},
    )
    close(their_logits(loaded_by_peft(base, tmp_path), base), ours)
    # Alone in its layer, down_proj has the only wrapper; beside gate_up_proj it has the outer one.
    shapes = {name: array.shape for name, array in load_file(tmp_path / "adapter_model.safetensors").items()}
    place = "base_model.model.model.layers.{}.mlp.experts."
    assert {name: shape for name, shape in shapes.items() if "experts" in name} == {
        f"{place.format(0)}lora_A.weight": (8 * 2, 64),
        f"{place.format(0)}lora_B.weight": (64, 2 * 8),
        f"{place.format(1)}base_layer.lora_A.weight": (8 * 3, 64),
        f"{place.format(1)}base_layer.lora_B.weight": (128, 3 * 8),
        f"{place.format(1)}lora_A.weight": (8 * 1, 64),
        f"{place.format(1)}lora_B.weight": (64, 1 * 8),
    }
    back = read_adapter(tmp_path)
    assert {name: target.rank for name, target in back.targets.items() if "experts" in name} == {
        down: 2,
        last: 3,
        "model.layers.1.mlp.experts.down_proj": 1,
    }


@pytest.mark.parametrize("target", EXPERTS)
def test_one_projection_alone(family, tmp_path, target):
    base = family("gpt_oss")
    ours = written(base, tmp_path, rank=2, targets=(target,))
    assert not any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert settings_of(tmp_path)["target_parameters"] == [target]
    close(their_logits(loaded_by_peft(base, tmp_path), base), ours)
    model = load_model(base, dtype="float32").model
    assert all(module.endswith(target) for module in attach_adapter(model, read_adapter(tmp_path), base_hash=None))
    close(logits(model, base), ours, 1e-6)


def test_linear_layers_that_peft_would_take_for_experts(family, tmp_path):
    """GLM's dense layers and shared experts have the names that experts' layers had in transformers 4."""
    base = family("glm4_moe")
    pattern = {"shared_experts.up_proj": 3, "o_proj": 1}
    ours = written(base, tmp_path, rank=2, dropout=0.1, targets="all-linear", rank_pattern=pattern)
    close(their_logits(loaded_by_peft(base, tmp_path), base), ours)
    model = load_model(base, dtype="float32").model
    targets = attach_adapter(model, read_adapter(tmp_path), base_hash=None)
    assert targets["model.layers.1.mlp.shared_experts.up_proj"].rank == 3
    assert targets["model.layers.0.mlp.up_proj"].rank == 2 and not [name for name in targets if ".experts." in name]
    close(logits(model, base), ours, 1e-6)


def made_by_peft(base, out, **settings):
    """An adapter of PEFT's with random A and B, and its logits."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(out)
    return their_logits(model, base)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_moe", dict(target_modules=list(FORMER))),  # becomes parameters, gate_up_proj of twice the rank
        ("mixtral", dict(target_modules=["q_proj", "w1", "w2", "w3"])),
        ("gpt_oss", dict(target_modules=None, target_parameters=[f"mlp.{EXPERTS[1]}"])),
        ("gpt_oss", dict(target_modules="all-linear", target_parameters=[f"mlp.{one}" for one in EXPERTS])),
    ],
)
def test_what_peft_writes_is_read(family, tmp_path, name, settings):
    base = family(name)
    theirs = made_by_peft(base, tmp_path, **settings)
    model = load_model(base, dtype="float32").model
    targets = attach_adapter(model, read_adapter(tmp_path), base_hash=None)
    if "w1" in str(settings) or settings["target_modules"] == list(FORMER):
        assert targets["model.layers.0.mlp.experts.gate_up_proj"] == (4, 2.0)
    close(logits(model, base), theirs)


def test_routers_are_refused(family, tmp_path):
    made_by_peft(family("qwen3_moe"), tmp_path, target_modules="all-linear")
    with pytest.raises(NotImplementedError, match=r"target_parameters names 'gate.weight', a router or another array"):
        read_adapter(tmp_path)


SPOILT = {
    "dropout": (dict(lora_dropout=0.1), r"lora.dropout=0.1: adapters of experts .* have none"),
    "no projection named": (dict(target_parameters=["mlp.other.gate_up_proj"]), "target_parameters names none of"),
    "both named": (dict(target_parameters=list(EXPERTS)), "names gate_up_proj and down_proj of"),
    "another rank": (dict(r=3), r"expected \[experts·3, in\] and \[out, 3·experts\] of rank 3"),
    "not a list": (dict(target_parameters="experts.down_proj"), "expected a list of texts"),
}


@pytest.fixture(scope="module")
def of_down(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("experts") / "down"
    model, section, targets = trained(family("qwen3_moe"), rank=2, targets=EXPERTS[1:])
    write_adapter(out, model, section, targets, TrainedOn("base"))
    return out


def changed(source, out, **settings):
    folder = shutil.copytree(source, out)
    (folder / "adapter_config.json").write_text(json.dumps(settings_of(folder) | settings))
    return folder


@pytest.mark.parametrize("fault", SPOILT)
def test_damaged_settings(of_down, tmp_path, fault):
    changes, words = SPOILT[fault]
    with pytest.raises(ValueError, match=words):
        read_adapter(changed(of_down, tmp_path / "damaged", **changes))


def test_experts_of_another_model(family, of_down, tmp_path):
    model = load_model(family("qwen3_moe"), dtype="float32").model
    fewer = read_adapter(changed(of_down, tmp_path / "fewer", r=4))
    with pytest.raises(ValueError, match=r"down_proj' is \(4, 4, 64\), this model needs \(8, 4, 64\)"):
        attach_adapter(model, fewer, base_hash=None)
    dense = load_model(family("llama"), dtype="float32").model
    with pytest.raises(ValueError, match="which this llama model of .* layers lacks"):
        attach_adapter(dense, read_adapter(of_down), base_hash=None)
