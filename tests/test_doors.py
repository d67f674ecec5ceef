"""What comes next can come in by its own door: a family with other norms, a format for projections, an adapter kind."""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection
from qlora_jax.io.hf import load_model, random_model
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.lora.adapter import PeftName
from qlora_jax.lora.kinds import KINDS, Kind
from qlora_jax.lora.low_rank import LoRA, Pair, low_rank_delta
from qlora_jax.models import ModelConfig
from qlora_jax.models.adapters import add_adapters, linears, projections
from qlora_jax.models.blocks import FEED_FORWARDS
from qlora_jax.models.blocks.block import Block, LinearPart
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.families.common import attention, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec
from qlora_jax.quant.formats import FORMATS
from qlora_jax.quant.packed import dequantized
from qlora_jax.quant.rules import Rules
from tests.tiny_config import CONFIG

TOKENS = jnp.asarray([[3, 14, 15, 92, 65, 35]])


def arcee(hf) -> ModelConfig:
    """What a family's table file would say of a decoder with MLPs of another kind."""
    layer = LayerSpec(LayerKind(attention(hf), Squared(inner=hf.intermediate_size)), rope=rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squared:
    """What a table file says of the block."""

    inner: int
    name: str = "mlp"


class SquaredMLP(Block):
    """down(relu(up(x))²)."""

    @classmethod
    def parts(cls, spec, config):
        D, F = config.hidden_size, spec.inner
        return {
            "up_proj": LinearPart(F, D, ("mlp", "embed")),
            "down_proj": LinearPart(D, F, ("embed", "mlp")),
        }

    def __call__(self, x, key=None):
        return self.down_proj(jnp.square(nnx.relu(self.up_proj(x))))


def test_a_family_with_a_block_of_its_own_is_a_table_and_a_block(monkeypatch, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = transformers.ArceeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.ArceeForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = theirs(torch.from_numpy(np.array(TOKENS))).logits.numpy()
    theirs.save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, "arcee", types.SimpleNamespace(from_hf=arcee))
    monkeypatch.setitem(FEED_FORWARDS, Squared, SquaredMLP)
    ours = load_model(tmp_path, dtype="float32").model
    np.testing.assert_allclose(ours(TOKENS), expected, rtol=2e-4, atol=2e-5)


def test_projections_are_stored_in_any_format_by_rule():
    rules = Rules((("*.mlp.*", FORMATS["int8"]), ("*.self_attn.*", FORMATS["nf4"])))
    model = random_model(CONFIG, 0, dtype="float32", rules=rules).model
    kinds = {path: type(linear.weight.get_value()).__name__ for path, linear in projections(model)}
    assert kinds["layers.mlp.up_proj"] == "Int8Tensor" and kinds["layers.self_attn.q_proj"] == "NF4Tensor"
    plain = random_model(CONFIG, 0, dtype="float32").model
    stored = dict(projections(model))
    for path, linear in projections(plain):
        linear.weight.set_value(dequantized(stored[path].weight.get_value()))
    np.testing.assert_allclose(model(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-6)
    ours, theirs = (gradients(one) for one in (model, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def gradients(model):
    add_adapters(model, LoraSection(rank=2), jax.random.key(0))
    graphdef, trained, base = nnx.split(model, nnx.Param, ...)
    return jax.grad(lambda trained: jnp.sum(nnx.merge(graphdef, trained, base)(TOKENS) ** 2))(trained)


class Stretched(NamedTuple):
    A: Any
    B: Any
    stretch: Any


class Stretching(LoRA):
    """(W + scale · B·A) with every output times a trained factor, which starts at 1."""

    Parts = Stretched
    NAMES = {**LoRA.NAMES, "stretch": PeftName("lora_stretch", "", 1)}

    def __init__(self, pair, stretch, scale, dropout):
        super().__init__(*pair, scale, dropout)
        self.stretch = nnx.LoRAParam(stretch)

    @classmethod
    def start(cls, key, name, target, shape, site):
        assert dequantized(site.weight()).shape == (shape.outputs, shape.inputs)
        return Stretched(*LoRA.start(key, name, target, shape, site), jnp.ones(shape.outputs, site.dtype))

    @classmethod
    def of(cls, parts, scale, dropout):
        return cls(
            (jnp.asarray(parts.A), jnp.asarray(parts.B)), jnp.asarray(parts.stretch), jnp.asarray(scale), dropout
        )

    @classmethod
    def stacked(cls, parts, shape, dtype):
        stretch = np.stack([np.ones(shape.outputs, dtype) if one is None else one.stretch for one in parts])
        pairs = [one and Pair(one.A, one.B) for one in parts]
        return Stretched(*super().stacked(pairs, shape, dtype), stretch)

    @classmethod
    def merge(cls, weight, parts, scale, rows=slice(None), expert=0):
        return (weight + low_rank_delta(parts.A, parts.B[rows], scale)) * parts.stretch[rows, None]

    def parts(self, layer, rank):
        stretch = np.asarray(self.stretch.get_value())
        return Stretched(*super().parts(layer, rank), stretch if layer is None else stretch[layer])

    def apply(self, y, made, weight, bias):
        return (y + made) * self.stretch.get_value().astype(y.dtype)


def test_an_adapter_kind_is_one_class(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "lora", Kind(Stretching, None))
    with pytest.raises(NotImplementedError, match="Stretching adapts linear layers alone: leave the experts out"):
        KINDS["lora"].of(experts=8)
    lora = LoraSection(rank=2, targets=("q_proj", "down_proj"))
    model = random_model(CONFIG, 0, dtype="float32").model
    before = model(TOKENS)
    targets = add_adapters(model, lora, jax.random.key(0))
    np.testing.assert_allclose(model(TOKENS), before, rtol=1e-5, atol=1e-6)
    for _, linear in linears(model):
        if linear.lora is not None:
            for values in (linear.lora.B, linear.lora.stretch):
                values.set_value(
                    values.get_value() + 0.1 * jax.random.normal(jax.random.key(1), values.get_value().shape)
                )
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("base"))
    again, adapter = random_model(CONFIG, 0, dtype="float32").model, read_adapter(tmp_path / "a")
    assert attach_adapter(again, adapter, base_hash=None) == targets
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    merged = random_model(CONFIG, 0, dtype="float32").model
    for path, linear in projections(merged):
        names = [f"model.layers.{i}.{path.removeprefix('layers.')}" for i in range(CONFIG.num_layers)]
        if names[0] in targets:
            weights = [np.asarray(weight) for weight in linear.weight.get_value()]
            pairs = zip(weights, names, strict=True)
            linear.weight.set_value(
                jnp.stack([Stretching.merge(w, adapter.weights[name], targets[name].scale) for w, name in pairs])
            )
    np.testing.assert_allclose(merged(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
