"""Every family's float32 logits against transformers': whole texts, packed documents, and through a cache."""

import numpy as np
import pytest

from qlora_jax.models.families import FAMILIES
from tests.families import ours
from tests.families.checkpoints import NAMES, STEPS, read_reference, text_type

pytest.importorskip("torch")
pytest.importorskip("transformers")

# The text models that the package must know, by `model_type`.
MUST = {
    "ernie4_5",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoehybrid",
    "hunyuan_v1_dense",
    "lfm2",
    "lfm2_moe",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "muse_glimmer_text",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_text",
    "seed_oss",
    "smollm3",
}
PENDING = {name for name in NAMES if text_type(name) not in FAMILIES}
CHECKPOINTS = [
    pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason="not read yet")] if name in PENDING else [])
    for name in NAMES
]
EVERY = pytest.mark.parametrize("name", CHECKPOINTS)


def test_the_package_knows_the_families_that_it_must():
    assert {text_type(name) for name in NAMES} == MUST
    assert not PENDING


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@EVERY
def test_whole_texts_and_packed_documents(checkpoint, name, measured):
    expected = read_reference(folder := checkpoint(name))
    logits = ours.logits(ours.load(folder).model, expected)
    assert_close(logits[:2], expected.logits)
    assert_close(logits[2], expected.packed)
    measured(ours.off(logits[:2], expected.logits))


@EVERY
def test_generating_through_a_cache(checkpoint, name, measured):
    expected = read_reference(folder := checkpoint(name))
    logits, chosen = ours.continued(ours.load(folder).model, expected)
    assert_close(logits[:, :STEPS], expected.step)
    assert np.array_equal(chosen, expected.greedy)
    measured(ours.off(logits[:, :STEPS], expected.step))
