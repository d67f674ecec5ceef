"""Logits against transformers (fp32, CPU) for every architecture, plain and with bitsandbytes' NF4."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.hf import load_model
from qlora_jax.quant.rules import rules_for
from tests.conftest import ARCHITECTURES, SIZES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))


def reference(folder, **options):
    """transformers' float32 logits of TOKENS."""
    # Not .eval(): there bitsandbytes repacks for a bfloat16 kernel on CPUs that have one. Nothing else differs.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(folder, quant):
    model = load_model(folder, dtype="float32", rules=rules_for(quant)).model
    return np.asarray(model(jnp.asarray(TOKENS, jnp.int32)))


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(checkpoint, name):
    folder = checkpoint(name)
    assert_close(ours(folder, "none"), reference(folder, attn_implementation="eager"))


@pytest.mark.parametrize("options", [dict(shard="40KB"), dict(dtype="bfloat16"), dict(dtype="float16")], ids=str)
def test_sharded_and_half_precision_checkpoints(checkpoint, options):
    folder = checkpoint("llama", **options)
    assert ("shard" in options) == (folder / "model.safetensors.index.json").exists()
    assert_close(ours(folder, "none"), reference(folder))


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and torch's own
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_nf4_logits_equal_bitsandbytes(checkpoint, name):
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(name)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized = reference(folder, quantization_config=config, device_map="cpu")
    assert_close(ours(folder, "nf4"), quantized)
    assert np.abs(quantized - reference(folder)).max() > 1e-2  # the quantization did something
