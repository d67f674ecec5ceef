"""Models with gated DeltaNet or short convolutions: adapters, their gradients and exported folders against peers'."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, QuantSection
from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model
from qlora_jax.io.model_config import parse_config, read_config
from qlora_jax.io.peft import TrainedOn, read_adapter, write_adapter
from qlora_jax.models.adapters import add_adapters, linears
from qlora_jax.models.table import linear_modules, table
from qlora_jax.quant.packed import is_packed
from qlora_jax.quant.rules import packed
from tests.families.checkpoints import DOCUMENTS, LENGTH, load, read_reference
from tests.families.hybrid import DELTA, PARTIAL
from tests.families.spec import sizes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

HYBRIDS = ("qwen3_5_text", "qwen3_5", "lfm2")
GATES = {"in_proj_a", "in_proj_b"}
LORA = LoraSection(rank=2, alpha=4, targets="all-linear")


@pytest.fixture(scope="module", params=HYBRIDS)
def folder(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """The model with a random adapter on every linear layer, and the adapter's folder."""
    model = load_model(folder, dtype="float32").model
    targets = add_adapters(model, LORA, jax.random.key(0))
    for i, (_, linear) in enumerate(linears(model)):
        if linear.lora is not None:
            B = linear.lora.B
            B.set_value(0.3 * jax.random.normal(jax.random.key(i), B.get_value().shape, jnp.float32))
    out = tmp_path_factory.mktemp("adapter")
    write_adapter(out, model, LORA, targets, TrainedOn(str(folder)))
    return model, out


@pytest.fixture(scope="module")
def theirs(folder, adapted):
    """PEFT's model with this adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(load(folder), adapted[1], is_trainable=True).eval()


def close(actual, expected, tolerance=1e-4):
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


def test_the_linear_layers_are_those_that_peft_adapts(folder, adapted, theirs):
    text = [name for name in linear_modules(adapted[0].config) if name != "lm_head"]
    named = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name, _ in theirs.named_modules()}
    assert set(text) == named - {""}
    fresh = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules="all-linear"))
    own = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name, _ in fresh.named_modules()}
    assert set(text) == {name for name in own - {""} if "visual" not in name}


def test_adapters_and_their_gradients_are_pefts(folder, adapted, theirs):
    """Two documents in a row here, each alone there; gradients of Σ logits · weights."""
    expected, model = read_reference(folder), adapted[0]
    documents = [row[:length] for row, length in zip(expected.tokens, DOCUMENTS, strict=True)]
    weights = np.random.default_rng(0).standard_normal(expected.packed.shape, np.float32)
    logits = torch.cat([theirs(input_ids=torch.tensor(one)[None]).logits[0] for one in documents])
    theirs.zero_grad()
    (logits * torch.tensor(weights)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}

    row = jnp.asarray(np.concatenate(documents), jnp.int32)[None]
    positions = jnp.asarray(np.concatenate([np.arange(length) for length in DOCUMENTS]), jnp.int32)[None]
    segments = jnp.repeat(jnp.asarray([1, 2]), jnp.asarray(DOCUMENTS), total_repeat_length=LENGTH)[None]
    graphdef, trained, rest = nnx.split(model, nnx.LoRAParam, ...)

    def measured(trained):
        found = nnx.merge(graphdef, trained, rest)(row, positions, segments)[0]
        return jnp.sum(found * weights), found

    own, found = jax.jit(jax.grad(measured, has_aux=True))(trained)
    close(found, logits.detach().numpy())
    compared = 0
    params = {param.module: param for param in table(model.config).values()}
    for path, linear in linears(nnx.merge(graphdef, own, rest)):
        for tensor in params[path].tensors() if linear.lora is not None else ():
            for name, value in (("A", linear.lora.A), ("B", linear.lora.B)):
                gradient = gradients.pop(f"base_model.model.{tensor.module}.lora_{name}.default.weight")
                close(value.get_value()[tensor.place], gradient)
                compared += 1
    assert not gradients and compared > 40


@pytest.fixture(scope="module")
def merged_folder(folder, adapted, tmp_path_factory):
    """The model with its adapter in the weights, in float32."""
    out = tmp_path_factory.mktemp("merged") / "merged"
    export_merged(folder, read_adapter(adapted[1]), out, dtype="float32")
    return out


def test_a_merged_folder_is_the_model_with_its_adapter(folder, merged_folder, theirs):
    config = transformers.AutoConfig.from_pretrained(merged_folder)
    merged, info = getattr(transformers, config.architectures[0]).from_pretrained(
        merged_folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = torch.tensor(read_reference(folder).tokens[:, :20])
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits.numpy()
        close(merged.eval()(input_ids=tokens).logits.numpy(), expected)


def test_a_4_bit_folder_is_read_by_transformers(folder, merged_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    export_bnb4(merged_folder, tmp_path / "packed")
    model = load(tmp_path / "packed").train()  # in eval() bitsandbytes computes in bfloat16 on some processors
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["out_proj"] == kinds.get("in_proj_qkv", kinds["out_proj"]) == "Linear4bit"
    assert {kinds[name] for name in GATES & kinds.keys()} <= {"Linear"}
    tokens = read_reference(folder).tokens[:, :20]
    own = load_model(tmp_path / "packed", dtype="float32").model
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    close(jax.jit(own.__call__)(jnp.asarray(tokens, jnp.int32)), expected)


def test_projections_are_packed_and_nothing_else(folder):
    model = load_model(folder, dtype="bfloat16", rules=packed(QuantSection())).model
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if str(path[0]).startswith("layers_") and "norm" not in path[1]:
            kinds[is_packed(value.get_value())].add(".".join(path[2:]))
            assert is_packed(value.get_value()) or value.get_value().dtype == jnp.bfloat16
    weights = [f"{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
    mlp = [f"{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    heads = [f"{name}_proj.weight" for name in "qkv"]
    if "lfm2" in folder.name:
        mlp = [f"{name}.weight" for name in ("w1", "w2", "w3")]
        assert kinds[True] == {"in_proj.weight", "out_proj.weight", *heads, *mlp}
        assert kinds[False] == {"conv.weight", "q_layernorm.weight", "k_layernorm.weight"}
    else:
        assert kinds[True] == {*weights, *mlp, *heads, "o_proj.weight"}
        gates = {f"{name}.weight" for name in GATES}
        arrays = {"A_log", "dt_bias", "conv1d.weight", "norm.weight"}
        assert kinds[False] == {*gates, *arrays, "q_norm.weight", "k_norm.weight"}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_peft_adapts_the_fused_projections_of_qwen3_next(checkpoint):
    """Its logits are compared in test_logits.py, its experts elsewhere."""
    folder = checkpoint("qwen3_next")
    adapters = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules="all-linear"))
    named = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name, _ in adapters.named_modules()}
    mixers = {name for name in linear_modules(read_config(folder)) if "attn" in name}
    assert {name for name in named if "attn" in name} == mixers and len(mixers) == 3 * 3 + 4


def test_sizes_that_cannot_be_are_refused():
    base = dict(model_type="qwen3_5_text", **sizes(rope_parameters=PARTIAL, **DELTA))
    with pytest.raises(ValueError, match="linear_num_value_heads=3 must be a multiple of linear_num_key_heads=2"):
        parse_config({**base, "linear_num_value_heads": 3})
    for field in ("linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"):
        for value in (0, -1, "4", 1.5, True):
            with pytest.raises(ValueError, match=field):
                parse_config({**base, field: value})
    with pytest.raises(NotImplementedError, match=r"layer_types \['sliding_attention'\] are not supported"):
        parse_config({**base, "layer_types": ["linear_attention"] * 3 + ["sliding_attention"]})
