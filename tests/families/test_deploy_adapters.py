"""Every family's adapters and merged folders in PEFT and transformers, and theirs here."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.export import export_merged
from qlora_jax.io.hf import open_folder, other_parts
from qlora_jax.io.peft import read_adapter
from qlora_jax.io.safetensors import TensorFolder
from tests.families import ours
from tests.families.table import families, has_experts

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
theirs = pytest.importorskip("tests.families.theirs")
# PEFT's own of every base; all other warnings, such as those of keys that do not fit, are errors.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
WRAPPED = "model.language_model."


def every(check: str):
    return pytest.mark.parametrize("subject", families(check), indirect=True, scope="session")


def assert_close(actual, expected) -> float:
    found = ours.off(actual, expected)
    assert found < ours.CLOSE
    return found


@every("to PEFT")
def test_peft_loads_our_adapter(subject, measured):
    model = theirs.adapted(subject.folder, subject.adapter)
    made, written = theirs.adapter_tensors(model), load_file(subject.adapter / "adapter_model.safetensors")
    assert written.keys() == made.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(made[name].detach().numpy(), value, err_msg=name)
    expected = theirs.logits(model, subject.reference.tokens)
    measured(assert_close(subject.adapted_logits[:2], expected))


@every("of PEFT")
def test_we_read_pefts_adapter(subject, measured):
    out = subject.scratch / "theirs"
    # PEFT's own "all-linear" has routers and towers. With gate_proj among the targets it adapts some models' experts.
    experts = has_experts(subject.name)
    own = subject.wrapped or experts
    model = theirs.save_random_adapter(subject.folder, out, list(subject.linears) if own else "all-linear")
    assert experts or read_adapter(out).weights.keys() == set(subject.linears)
    expected = theirs.logits(model, subject.reference.tokens)
    measured(assert_close(subject.logits_with(out)[:2], expected))


@every("prefix")
def test_the_adapter_of_the_other_class_is_read(subject, measured):
    """transformers' class of the text part alone calls the modules model.layers…"""
    file, out = "adapter_model.safetensors", subject.scratch / "renamed"
    shutil.copytree(subject.adapter, out)
    tensors = load_file(out / file)
    assert all(f".{WRAPPED}" in name for name in tensors)
    save_file({name.replace(f".{WRAPPED}", ".model."): value for name, value in tensors.items()}, out / file)
    settings = json.loads((out / "adapter_config.json").read_text())
    names = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    (out / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": names}))
    measured(assert_close(subject.logits_with(out), subject.adapted_logits))


@every("merged")
def test_transformers_loads_the_merged_folder(subject, measured):
    out = subject.scratch / "merged"
    export_merged(subject.folder, read_adapter(subject.adapter), out, dtype="float32")
    found = theirs.logits(theirs.load_strictly(out, subject.folder, dtype="float32"), subject.reference.tokens)
    config, before = open_folder(subject.folder)
    after = TensorFolder(out)
    passed = other_parts(config, before)
    # Gemma 4's unified models have no tower.
    assert bool(passed) == (subject.name.endswith("_mtp") or (subject.wrapped and subject.name != "gemma4_unified"))
    for name in passed:
        assert after.read(name).tobytes() == before.read(name).tobytes(), name
    measured(assert_close(found, subject.adapted_logits[:2]))
