"""The checkpoints that other tests rely on: complete, the same each time, and with nothing left at a trivial value."""

import numpy as np
import pytest

from tests.families.checkpoints import DOCUMENTS, FAMILIES, NAMES, STEPS, make, read_reference
from tests.families.layouts import LAYOUTS, LEVELS
from tests.families.spec import VOCABULARY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

OTHER_PARTS = ("vision", "visual", "audio", "projector", "mtp.")


def tensors(folder, of_text=True):
    """torch tensors by name, those of the text model only."""
    found = safetensors.load_file(folder / "model.safetensors")
    return {name: x for name, x in found.items() if not of_text or not any(part in name for part in OTHER_PARTS)}


def assert_close(actual, expected, share=1e-4):
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_computes_agrees_with_itself(checkpoint, name):
    found = read_reference(checkpoint(name))
    assert all(np.isfinite(array).all() for array in found)
    assert_close(found.step, found.logits[:, -STEPS:])
    # By its length a text chooses among longrope's factors, so that a document's start is not a longer one's.
    first, last = found.packed[: DOCUMENTS[0]], found.packed[DOCUMENTS[0] :]
    assert_close(last, found.logits[1, : DOCUMENTS[1]])
    if name == "phi4_mini":
        assert np.abs(first - found.logits[0, : DOCUMENTS[0]]).max() > 1e-2
    else:
        assert_close(first, found.logits[0, : DOCUMENTS[0]])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_show_and_can_be_packed(checkpoint, name):
    for path, tensor in tensors(checkpoint(name)).items():
        values = tensor.float()
        assert values.abs().max() < 10, path
        assert values.numel() == 1 or values.std() > 0.01, path
        assert not torch.isin(values.mean(), torch.tensor([0.0, 1.0])).item(), path
        if path.endswith("proj.weight"):
            assert tensor.shape[1] % 64 == 0 or tensor.shape[1] % 16, (path, tensor.shape)


def test_making_one_again_gives_the_same_bytes(checkpoint, tmp_path):
    first, again = checkpoint("qwen3_moe"), make(tmp_path, "qwen3_moe")
    for path in first.iterdir():
        if path.suffix != ".npz":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    other = make(tmp_path / "other", "qwen3_moe", seed=1)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_the_tokenizer_knows_no_token_beyond_the_vocabulary(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Täglich 12 × π?"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer) == VOCABULARY > max(ids)
    assert tokenizer.decode(ids) == text


def decoded(codes: bytes) -> np.ndarray:
    """MXFP4 levels of packed codes, the low half of a byte first."""
    pairs = np.frombuffer(codes, np.uint8)
    return LEVELS[np.stack([pairs & 15, pairs >> 4], -1)].reshape(-1, 32)


def test_mxfp4_holds_the_experts(checkpoint):
    plain, packed = tensors(checkpoint("gpt_oss")), tensors(checkpoint("gpt_oss_mxfp4"))
    names = [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert packed.keys() ^ plain.keys() == {f"{n}{end}" for n in names for end in ("", "_blocks", "_scales")}
    for name in names:
        scales = 2.0 ** (packed[f"{name}_scales"].numpy().reshape(-1, 1).astype(np.float32) - 127)
        weights = plain[name].float().numpy().swapaxes(1, 2).reshape(-1, 32)
        found = decoded(packed[f"{name}_blocks"].numpy().tobytes()) * scales
        assert np.linalg.norm(found - weights) < 0.15 * np.linalg.norm(weights)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not layout.unpacks])
def test_another_layout_is_the_same_model(checkpoint, name):
    family = checkpoint(LAYOUTS[name].family)
    assert tensors(checkpoint(name), of_text=False).keys() != tensors(family, of_text=False).keys()
    assert_close(read_reference(checkpoint(name)).logits, read_reference(family).logits)


def test_the_names_of_the_hub(checkpoint):
    def has(name, start):
        return any(path.startswith(start) for path in tensors(checkpoint(name), of_text=False))

    assert has("gemma3", "language_model.model.layers.") and has("mistral3", "language_model.model.layers.")
    assert has("gemma3_model_first", "model.language_model.layers.")
    assert has("mistral3_model_first", "model.language_model.layers.") and has("mistral3_model_first", "lm_head.")
    assert has("qwen3_5_mtp", "mtp.layers.0.") and has("glm4_moe_mtp", "model.layers.3.eh_proj.")
    assert has("qwen3_moe", "model.layers.0.mlp.experts.7.up_proj.")
    assert has("qwen3_moe_fused", "model.layers.0.mlp.experts.gate_up_proj")
