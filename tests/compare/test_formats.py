"""The simulated 4-bit formats: their levels, and bitsandbytes' own FP4 and NF4."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.compare.formats import FORMATS, round_model, write_rounded
from qlora_jax.io.hf import load_model
from qlora_jax.quant.nf4 import CODEBOOKS, dequantize, quantize
from qlora_jax.quant.rules import rules_for

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("fp4-e2m1", [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]),
        ("fp4-e3m0", [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("int4", [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1]),
    ],
)
def test_levels(name, positive):
    levels = CODEBOOKS[name]
    assert levels.dtype == np.float32 and len(levels) == 15
    np.testing.assert_allclose(levels[7:], positive, rtol=1e-6)
    np.testing.assert_array_equal(levels, -levels[::-1])


def test_a_block_is_rounded_by_its_own_largest_magnitude():
    weight = jnp.zeros((2, 64)).at[0, :4].set(jnp.array([6.0, 1.3, -2.4, 0.2])).at[1, 0].set(-0.6).at[1, 1].set(0.26)
    rounded = np.asarray(FORMATS["fp4-e2m1"](weight))
    np.testing.assert_allclose(rounded[0, :5], [6, 1.5, -2, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rounded[1, :3], [-0.6, 0.3, 0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 128), (5, 100), (1, 3)])
@pytest.mark.parametrize(("ours", "theirs"), [("fp4-bnb", "fp4"), ("nf4", "nf4")])
def test_it_is_bitsandbytes_own(ours, theirs, shape):
    bnb, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    weight = RNG.standard_normal(shape).astype(np.float32)
    packed = bnb.quantize_4bit(torch.from_numpy(weight), quant_type=theirs)
    expected = bnb.dequantize_4bit(*packed).numpy()
    np.testing.assert_allclose(np.asarray(FORMATS[ours](jnp.asarray(weight))), expected, rtol=1e-6, atol=1e-7)


def test_nf4_with_double_quantization_is_what_qlora_trains_on():
    weight = jnp.asarray(RNG.standard_normal((8, 128)), jnp.float32)
    np.testing.assert_array_equal(FORMATS["nf4-dq"](weight), dequantize(quantize(weight)))
    assert not np.array_equal(FORMATS["nf4-dq"](weight), FORMATS["nf4"](weight))


def test_a_rounded_folder_differs_in_its_projections_alone(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    write_rounded(source, tmp_path / "int4", "int4")
    before, after = (
        load_model(folder, dtype="float32", rules=rules_for("none")).model for folder in (source, tmp_path / "int4")
    )
    np.testing.assert_array_equal(before.embed_tokens.weight.get_value(), after.embed_tokens.weight.get_value())
    old, new = (np.asarray(model.layers.mlp.up_proj.weight.get_value()) for model in (before, after))
    assert new.dtype == np.float32 and not np.array_equal(old, new)
    for layer in range(3):
        np.testing.assert_array_equal(new[layer], FORMATS["int4"](jnp.asarray(old[layer])))
    round_model(before, "int4")
    np.testing.assert_array_equal(before.layers.mlp.up_proj.weight.get_value(), new)
