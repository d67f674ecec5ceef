import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft.utils.other import get_pattern_key

from qlora_jax.config import LoraSection
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.models import count_parameters, linear_modules
from qlora_jax.models.adapters import TRAINABLE, adapter_count, add_adapters

SEVEN_B = Path("configs/geometry/llama-2-7b.json")
MODULES = [f"model.layers.{i}.{p}" for i in range(2) for p in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
MODULES.append("lm_head")


def test_seven_billion_rank_8_on_q_and_v():
    config = read_config(SEVEN_B)
    targets = resolve_targets(LoraSection(rank=8, targets=("q_proj", "v_proj")), linear_modules(config))
    assert adapter_count(config, targets) == 4_194_304
    assert count_parameters(config) == 6_738_415_616
    assert f"{adapter_count(config, targets) / count_parameters(config):.2%}" == "0.06%"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", MODULES[:-1]),
        (("q_proj",), [MODULES[0], MODULES[3]]),
        (("mlp.up_proj", "lm_head"), [MODULES[2], MODULES[5], "lm_head"]),
        (r".*layers\.1\..*_proj", MODULES[3:6]),
        (("model.layers.0.mlp.up_proj",), [MODULES[2]]),
    ],
)
def test_what_a_target_matches(targets, expected):
    assert list(resolve_targets(LoraSection(targets=targets), MODULES)) == expected


MIXTURE = [
    *(f"model.layers.1.{p}" for p in ("self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    *("model.layers.0.mlp.down_proj", "model.layers.1.router.proj", "lm_head"),
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [MIXTURE[0], MIXTURE[3]]),
        (("down_proj",), [MIXTURE[3]]),
        (("experts.down_proj",), [MIXTURE[2]]),
        (("mlp.experts.gate_up_proj", "down_proj"), [MIXTURE[1], MIXTURE[3]]),
        ((MIXTURE[2],), [MIXTURE[2]]),
        (r".*\.mlp\..*", [MIXTURE[3]]),
        (r".*\.experts\..*", MIXTURE[1:3]),
        (("proj",), [MIXTURE[4]]),
    ],
)
def test_experts_are_asked_for_by_name(targets, expected):
    assert list(resolve_targets(LoraSection(targets=targets), MIXTURE)) == expected


def test_what_names_no_experts_says_how_they_are_named():
    hint = "the experts are asked for as experts.down_proj and experts.gate_up_proj$"
    with pytest.raises(ValueError, match=rf"'gate_proj' matches no module. .*q_proj; .*{hint}"):
        resolve_targets(LoraSection(targets=("q_proj", "gate_proj")), MIXTURE)
    with pytest.raises(ValueError, match="'experts.down_proj' matches no module.*; this model has no experts$"):
        resolve_targets(LoraSection(targets=("q_proj", "experts.down_proj")), MODULES)


def test_experts_have_no_dropout():
    with pytest.raises(ValueError, match=r"lora.dropout=0.1: adapters of experts \('model.layers.1.mlp.experts.down_"):
        resolve_targets(LoraSection(targets=("experts.down_proj",), dropout=0.1), MIXTURE)
    assert resolve_targets(LoraSection(dropout=0.1), MIXTURE)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), ("proj",), r"q_proj", "all_linear"])
def test_a_target_that_matches_nothing_lists_what_could(targets):
    with pytest.raises(
        ValueError, match=r"matches no module. Names that can be matched: lm_head, q_proj, up_proj, v_proj"
    ):
        resolve_targets(LoraSection(targets=targets), MODULES)


def test_exceptions_to_rank_and_alpha():
    config = LoraSection(
        rank=8,
        alpha=16,
        rank_pattern={"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 32},
        alpha_pattern={"v_proj": 4},
    )
    assert resolve_targets(config, MODULES) == {
        MODULES[0]: Target(8, 2.0),
        MODULES[1]: Target(8, 0.5),
        MODULES[2]: Target(2, 8.0),
        MODULES[3]: Target(32, 0.5),
        MODULES[4]: Target(8, 0.5),
        MODULES[5]: Target(2, 8.0),
    }


@pytest.mark.parametrize(
    "key", ["proj", "_proj", "q_proj", "attn.q_proj", ".*q_proj", "self_attn.*", "lm_head", "up_proj$"]
)
def test_an_exception_names_the_modules_that_it_names_in_peft(key):
    targets = resolve_targets(LoraSection(rank=8, rank_pattern={key: 2}, targets=r".*(proj|head)"), MODULES)
    expected = {name: 2 if get_pattern_key([key], name) == key else 8 for name in MODULES}
    assert {name: target.rank for name, target in targets.items()} == expected


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoraSection(rank=16, alpha=8, variant="rslora", targets=("q_proj",))
    assert resolve_targets(config, MODULES)[MODULES[0]] == Target(16, 8 / math.sqrt(16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "config.lora.rank=0: expected an integer of at least 1"),
        (dict(dropout=1.0), "config.lora.dropout=1.0: expected a finite number from 0 up to, but not including, 1"),
        (dict(variant="dora"), "config.lora.variant='dora': expected 'lora' or 'rslora'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSection(**settings)


@pytest.fixture
def tiny(checkpoint):
    return abstract_model(read_config(checkpoint("llama")))


def adapters(model, config):
    add_adapters(model, config, jax.random.key(0))
    return nnx.to_pure_dict(nnx.split(model, TRAINABLE, ...)[1])


def test_the_whole_adapter_tree(tiny):
    tree = jax.tree.map(
        lambda a: (a.shape, str(a.dtype)), adapters(tiny, LoraSection(rank=4, targets=("q_proj", "down_proj")))
    )
    assert tree == {
        "layers": {
            "self_attn": {"q_proj": {"lora": {"A": ((3, 4, 64), "float32"), "B": ((3, 64, 4), "float32")}}},
            "mlp": {"down_proj": {"lora": {"A": ((3, 4, 128), "float32"), "B": ((3, 64, 4), "float32")}}},
        }
    }


def test_initial_values_are_pefts(tiny):
    pair = adapters(tiny, LoraSection(rank=16, targets=("down_proj",)))["layers"]["mlp"]["down_proj"]["lora"]
    bound = 1 / math.sqrt(128)
    assert float(jnp.abs(pair["B"]).max()) == 0
    assert float(jnp.abs(pair["A"]).max()) <= bound
    assert float(jnp.std(pair["A"])) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert len({float(a) for a in pair["A"][:, 0, 0]}) == 3  # every layer draws its own


def test_another_target_moves_no_one_elses_values(checkpoint):
    config = read_config(checkpoint("llama"))
    alone = adapters(abstract_model(config), LoraSection(rank=4, targets=("q_proj",)))
    among = adapters(abstract_model(config), LoraSection(rank=4))
    pick = lambda tree: np.asarray(tree["layers"]["self_attn"]["q_proj"]["lora"]["A"])  # noqa: E731
    np.testing.assert_array_equal(pick(alone), pick(among))


def test_unequal_ranks_are_padded_with_zeros(tiny):
    config = LoraSection(rank=2, targets=r".*layers\.[01]\..*q_proj", rank_pattern={r"layers\.1\.self_attn\.q_proj": 4})
    A = adapters(tiny, config)["layers"]["self_attn"]["q_proj"]["lora"]["A"]
    assert [int((np.abs(layer).sum(1) > 0).sum()) for layer in np.asarray(A)] == [2, 4, 0]
