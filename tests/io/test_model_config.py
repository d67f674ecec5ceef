"""config.json with fields of wrong kinds: one error that names the field, never a traceback."""

import json
import math

import pytest

from qlora_jax.io.json_object import LARGEST
from qlora_jax.io.model_config import parse_config, read_config
from tests.conftest import SIZES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BASE = {**SIZES, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# What no field of the configuration may be. None is what some may be, and then counts as absent.
ODD = ["4", "", [1], [None], {"a": 1}, -1, 0, 1.5, math.nan, math.inf, True, 10**9, 10**400]
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "hidden_act"),
    *("tie_word_embeddings", "head_dim", "sliding_window", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling"),
    *("rope_parameters", "layer_types", "max_window_layers", "use_sliding_window", "torch_dtype", "dtype"),
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_kind_is_named_or_harmless(field, family):
    for value in [None, *ODD]:
        try:
            config = parse_config({**BASE, "model_type": family, field: value})
        except (ValueError, NotImplementedError) as error:
            words = str(error)
            assert field in words or "number of attention heads" in words, (value, words)
            assert "\n" not in words
        else:
            layer = config.layers[0]
            head_dim = layer.kind.mixer.head_dim
            sizes = (config.vocab_size, config.hidden_size, config.num_layers, head_dim, config.max_position)
            assert all(type(size) is int and size > 0 for size in sizes), value
            assert 0 < layer.rope.theta < math.inf and layer.rope.scaling.kind in ("default", "linear"), value


def test_nulls():
    with pytest.raises(ValueError, match="rope_theta is null, expected a number above 0"):
        parse_config(BASE | {"rope_theta": None})
    with pytest.raises(ValueError, match="vocab_size"):
        parse_config(BASE | {"vocab_size": None})
    plain = parse_config(BASE | {"num_key_value_heads": None}).kinds[0].mixer
    assert plain.kv_heads == plain.heads == BASE["num_attention_heads"]
    assert parse_config(BASE | {"head_dim": None, "rope_scaling": None}) == parse_config(BASE)


def test_activations():
    assert parse_config(BASE | {"hidden_act": "gelu"}).kinds[0].feed_forward.activation == "gelu"
    with pytest.raises(NotImplementedError, match="hidden_act 'relu6' is not supported, only 'silu'"):
        parse_config(BASE | {"hidden_act": "relu6"})


def test_layers_that_slide():
    values = BASE | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert parse_config(values | {"layer_types": kinds}).layers[1].window == 8
    with pytest.raises(ValueError, match="names sliding_attention, but sliding_window is null"):
        parse_config(values | {"layer_types": kinds, "sliding_window": None})
    with pytest.raises((ValueError, NotImplementedError), match="layer_types"):
        parse_config(values | {"layer_types": ["chunked_attention"] * 3})


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "holds a list, no JSON object"),
        ("{", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        (" " * (LARGEST + 1), "has .* bytes, at most"),
        (json.dumps(BASE | {"model_type": ["llama"]}), "model_type .*is not supported; these are: ernie"),
        (json.dumps(BASE | {"model_type": None}), "model_type None is not supported"),
        (json.dumps(BASE | {"quantization_config": [1]}), "quantization_config is .1., expected an object"),
    ],
)
def test_a_file_that_is_something_else(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, NotImplementedError), match=f"config.json:? {words}"):
        read_config(tmp_path)
