"""The same base in other dtypes or in 4 bits is the same base, and any other one is not."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraSection
from qlora_jax.io.adapter import check_base
from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model
from qlora_jax.io.identity import SAMPLE, BaseHash
from qlora_jax.io.peft import TrainedOn, read_adapter, write_adapter
from qlora_jax.io.sample import POINTS, same_values
from qlora_jax.quant.rules import rules_for
from tests.io.adapters import with_random_adapter
from tests.io.test_export import make_adapter
from tests.io.torch_model import load


def identity(folder) -> BaseHash:
    return load_model(folder, dtype="float32", rules=rules_for("auto")).content_hash


def in_dtype(base, folder, dtype):
    load(base, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(base, tmp_path_factory):
    """The bfloat16 base, its copies in other dtypes and as transformers packs it, and other bases."""
    folder = tmp_path_factory.mktemp("bases")
    packed = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(base, quantization_config=packed, dtype=torch.bfloat16, device_map="cpu").save_pretrained(folder / "packed")
    for name in ("float16", "float32"):
        in_dtype(base, folder / name, getattr(torch, name))
    load(folder / "float32", quantization_config=packed, dtype=torch.float32, device_map="cpu").save_pretrained(
        folder / "packed from float32"
    )
    tuned = shutil.copytree(folder / "float32", folder / "tuned")
    tensors, random = load_file(tuned / "model.safetensors"), np.random.default_rng(0)
    noise = {n: v + 0.01 * random.normal(size=v.shape).astype(np.float32) * v.std() for n, v in tensors.items()}
    save_file(noise, tuned / "model.safetensors", metadata={"format": "pt"})
    load(tuned, quantization_config=packed, dtype=torch.float32, device_map="cpu").save_pretrained(
        folder / "packed from tuned"
    )
    return {"bfloat16": base} | {path.name: path for path in folder.iterdir()}


SAME = [
    *[(a, b) for a in ("bfloat16", "float16", "float32") for b in ("bfloat16", "float32") if a != b],
    *[("packed", b) for b in ("bfloat16", "float32")],
    ("bfloat16", "float16"),
    ("packed from float32", "bfloat16"),
]
OTHER = [
    *[(a, "tuned") for a in ("bfloat16", "float16", "packed", "packed from float32")],
    ("tuned", "bfloat16"),
    ("packed from tuned", "bfloat16"),
    ("packed from tuned", "float32"),
    ("bfloat16", "packed"),  # what it was packed from cannot be seen any more
    ("packed", "packed from tuned"),
]


@pytest.mark.parametrize(("recorded", "given"), SAME)
def test_the_same_base(recorded, given, bases):
    adapter = make_adapter(base_hash=str(identity(bases[recorded])), extra={SAMPLE: identity(bases[recorded]).sample})
    check_base(adapter, identity(bases[given]))


@pytest.mark.parametrize(("recorded", "given"), OTHER)
def test_another_base(recorded, given, bases):
    adapter = make_adapter(base_hash=str(identity(bases[recorded])), extra={SAMPLE: identity(bases[recorded]).sample})
    with pytest.raises(ValueError, match="adapter for another base"):
        check_base(adapter, identity(bases[given]))


def test_in_the_same_dtype_every_byte_counts(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    changed = tensors["model.layers.0.mlp.up_proj.weight"].copy()
    changed[0, 1] *= 2
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": changed}, other / "model.safetensors")
    assert identity(other).sample == identity(base).sample  # it does not happen to be one of the sampled
    assert not identity(other).holds(identity(base).sample)
    adapter = make_adapter(base_hash=identity(base), extra={SAMPLE: identity(base).sample})
    with pytest.raises(ValueError, match="adapter for another base"):
        check_base(adapter, identity(other))


@pytest.mark.parametrize("text", ["", ":", "b", "b:!", "b:AAAA", "zz:" + "A" * 88, "b" * 40, "ü:AAAA"])
def test_a_record_that_holds_no_sample(text, bases):
    assert not same_values(text, identity(bases["float32"]).points)


def test_a_record_keeps_a_sample_and_the_digest(base, tmp_path):
    lora = LoraSection(rank=2, targets=("q_proj",))
    model, targets = with_random_adapter(base, lora)
    found = identity(base)
    write_adapter(tmp_path / "a", model, lora, targets, TrainedOn("b", found))
    adapter = read_adapter(tmp_path / "a")
    assert adapter.base_hash == found and adapter.extra == {SAMPLE: found.sample}
    assert len(found) == 32 and len(found.points) == len(load_file(base / "model.safetensors"))
    assert all(len(point.values) == POINTS for point in found.points)


def test_an_adapter_of_a_packed_base_merges_into_the_original(bases, tmp_path):
    found = identity(bases["packed"])
    adapter = make_adapter(base_hash=found, extra={SAMPLE: found.sample})
    export_merged(bases["bfloat16"], adapter, tmp_path / "merged")
    export_bnb4(bases["float32"], tmp_path / "packed", adapter)
    export_merged(bases["bfloat16"], make_adapter(), tmp_path / "expected")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    with pytest.raises(ValueError, match="adapter for another base"):
        export_merged(bases["tuned"], adapter, tmp_path / "no")
