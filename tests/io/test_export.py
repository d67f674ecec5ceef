"""Merged and 4-bit folders against PEFT's merge and bitsandbytes' quantization."""

import errno
import json
import shutil
from collections import namedtuple

import bitsandbytes
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraSection, QuantSection
from qlora_jax.io import shards
from qlora_jax.io.adapter import Adapter
from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model
from qlora_jax.lora.low_rank import Pair
from qlora_jax.quant import int8
from qlora_jax.quant.rules import packed, rules_for
from tests.io.torch_model import load, logits

ATTENTION = "model.layers.1.self_attn.q_proj"
ADAPTED = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(3) for p in "qv"]
BF16 = np.dtype(ml_dtypes.bfloat16)
# One unit in the last place of bfloat16, relative.
ULP = 2.0**-7


def make_adapter(**changes) -> Adapter:
    """Random A and B of ranks 3 (queries) and 2 (values)."""
    lora = LoraSection(rank=3, alpha=6.0, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2})
    random = np.random.default_rng(0)
    weights = {}
    for name in ADAPTED:
        n, rank = (64, 3) if name.endswith("q_proj") else (32, 2)
        A, B = random.normal(0, 0.1, (rank, 64)), random.normal(0, 0.1, (n, rank))
        weights[name] = Pair(A.astype(np.float32), B.astype(np.float32))
    fields = dict(lora=lora, weights=weights, base="org/llama", base_hash=None, extra={})
    return Adapter(**(fields | changes))


def delta(adapter, name) -> np.ndarray:
    A, B = (torch.from_numpy(matrix) for matrix in adapter.weights[name])
    return (B @ A * (6.0 / len(A))).numpy()


def tensors_of(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def round_trip(weight: np.ndarray) -> np.ndarray:
    """bitsandbytes' NF4 with double quantization and back, float32."""
    tensor = torch.from_numpy(weight.astype(np.float32)).to(torch.bfloat16)
    packed = bitsandbytes.functional.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bitsandbytes.functional.dequantize_4bit(*packed).float().numpy()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == BF16
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=ULP, atol=1e-6)


def test_merged_into_the_original_is_the_rounded_sum(base, tmp_path):
    adapter = make_adapter()
    export_merged(base, adapter, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module in ADAPTED:
            assert_close(after[name], weight.astype(np.float32) + delta(adapter, module))
            assert not np.array_equal(after[name], weight)
        else:
            np.testing.assert_array_equal(after[name], weight, err_msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merged_in_float32_has_the_logits_of_pefts_merge(base, tmp_path):
    adapter = make_adapter()
    export_merged(base, adapter, tmp_path / "out", dtype="float32")
    settings = dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    theirs = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name in ADAPTED:
            module = theirs.get_submodule(f"base_model.model.{name}")
            for matrix, value in zip((module.lora_A, module.lora_B), adapter.weights[name], strict=True):
                matrix["default"].weight.copy_(torch.from_numpy(value))
    merged = load(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(logits(merged), logits(theirs.merge_and_unload()), rtol=0, atol=1e-4)


def test_merged_into_the_dequantized_is_what_training_saw(base, tmp_path):
    adapter = make_adapter()
    export_merged(base, adapter, tmp_path / "out", into="dequantized")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        expected = round_trip(weight) if "_proj" in name else weight.astype(np.float32)
        assert_close(after[name], expected + delta(adapter, module) if module in ADAPTED else expected)
    assert not np.array_equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_double_and_lm_head_are_honoured(base, tmp_path):
    adapter = make_adapter()
    ways = {"single": {"double": False}, "head": {"lm_head": "nf4"}, "both": {"lm_head": "int8", "embedding": "int8"}}
    for out, options in (ways | {"plain": {}}).items():
        rules = packed(QuantSection(**options))
        export_merged(base, adapter, tmp_path / out, into="dequantized", rules=rules)
    single, head, both, plain = (tensors_of(tmp_path / out) for out in ("single", "head", "both", "plain"))
    differing = {n for n in plain if not np.array_equal(plain[n], single[n])}
    assert differing == {n for n in plain if "_proj" in n}
    assert {n for n in plain if not np.array_equal(plain[n], head[n])} == {"lm_head.weight"}
    tables = {"lm_head.weight", "model.embed_tokens.weight"}
    assert {n for n in plain if not np.array_equal(plain[n], both[n])} == tables
    for name in tables:
        np.testing.assert_array_equal(both[name], int8.quantize(jnp.asarray(plain[name])).dequantize())


def test_a_packed_base_merges_into_what_it_dequantizes_to(base, tmp_path):
    adapter = make_adapter()
    export_bnb4(base, tmp_path / "packed")
    export_merged(tmp_path / "packed", adapter, tmp_path / "from-packed", into="dequantized")
    export_merged(base, adapter, tmp_path / "from-original", into="dequantized")
    ours, theirs = tensors_of(tmp_path / "from-packed"), tensors_of(tmp_path / "from-original")
    assert ours.keys() == theirs.keys() == tensors_of(base).keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    settings = json.loads((tmp_path / "from-packed" / "config.json").read_text())
    assert "quantization_config" not in settings and settings["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"holds 'model.layers.0.mlp.down_proj.weight' in 4 bits, not its original: g"):
        export_merged(tmp_path / "packed", adapter, tmp_path / "no")


def test_4_bit_with_an_adapter_packs_the_merged_weights(base, tmp_path):
    adapter = make_adapter()
    export_merged(base, adapter, tmp_path / "merged")
    export_bnb4(tmp_path / "merged", tmp_path / "two-steps")
    export_bnb4(base, tmp_path / "one-step", adapter)
    ours, theirs = tensors_of(tmp_path / "one-step"), tensors_of(tmp_path / "two-steps")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    text = (tmp_path / "one-step" / "README.md").read_text()
    assert "NF4 with double quantization for bitsandbytes. A LoRA adapter was added to the original weights" in text


def test_a_packed_copy_is_the_base_and_a_packed_merge_is_another(base, tmp_path):
    export_bnb4(base, tmp_path / "copy")
    export_bnb4(base, tmp_path / "merge", make_adapter())

    def identity(folder):
        return load_model(folder, dtype="bfloat16", rules=rules_for("auto")).content_hash

    assert identity(tmp_path / "copy") == identity(base)
    assert identity(tmp_path / "merge") != identity(base)
    assert not (tmp_path / "merge" / "qlora_jax.json").exists()


@pytest.mark.parametrize("odd", ["norm", "embed_tokens", "lm_head"])
def test_transformers_runs_a_packed_copy_of_a_base_in_several_dtypes(odd, base, tmp_path):
    shutil.copytree(base, tmp_path / "mixed")
    tensors = {n: v.astype(np.float32) if odd in n else v for n, v in tensors_of(base).items()}
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    export_bnb4(tmp_path / "mixed", tmp_path / "packed")
    export_bnb4(base, tmp_path / "even")
    ours, even = (load(tmp_path / name, dtype="auto", device_map="cpu") for name in ("packed", "even"))
    np.testing.assert_array_equal(logits(ours), logits(even))


def test_the_merged_folder(base, tmp_path):
    export_merged(base, make_adapter(), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "LICENSE.txt",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before and after["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/llama\nlibrary_name: transformers\n")
    assert "Base model: `org/llama`. A LoRA adapter is added to the original weights." in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_card_does_not_show_this_machines_paths(base, tmp_path):
    export_bnb4(base, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(base) not in card and "Base model: `base`." in card and "base_model:" not in card


def test_shards(base, tmp_path):
    adapter = make_adapter()
    export_merged(base, adapter, tmp_path / "one")
    export_merged(base, adapter, tmp_path / "many", shard_bytes=60_000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = tensors_of(tmp_path / "one")
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in one.values())}
    held = {file: load_file(tmp_path / "many" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert all(sum(value.nbytes for value in tensors.values()) <= 60_000 for tensors in held.values())
    np.testing.assert_array_equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))
    # And as a base.
    export_merged(tmp_path / "many", make_adapter(), tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == one.keys()


def test_a_tied_output_layer_is_not_written_twice(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama-tied", dtype="bfloat16"), tmp_path / "tied")
    tensors = tensors_of(tmp_path / "tied")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    export_merged(tmp_path / "tied", make_adapter(), tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys() - {"lm_head.weight"}
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_each_tensor_keeps_its_own_dtype(base, tmp_path):
    shutil.copytree(base, tmp_path / "mixed")
    tensors = tensors_of(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    export_merged(tmp_path / "mixed", make_adapter(), tmp_path / "out")
    written = {name: value.dtype for name, value in tensors_of(tmp_path / "out").items()}
    assert written == {name: value.dtype for name, value in tensors.items()}
    assert written["model.norm.weight"] == np.float32


def test_the_right_base_is_accepted_and_another_refused(base, tmp_path):
    content_hash = load_model(base, dtype="bfloat16", rules=rules_for("none")).content_hash
    export_merged(base, make_adapter(base_hash=content_hash), tmp_path / "right")
    with pytest.raises(ValueError, match=f"adapter for another base: .* hash 0123, this base has {content_hash}: giv"):
        export_merged(base, make_adapter(base_hash="0123"), tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_refuses_an_adapter_that_does_not_fit(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"lora_A of 'model.layers.0.self_attn.q_proj' is \(3, 64\), this model needs"):
        export_merged(checkpoint(hidden_size=128), make_adapter(), tmp_path / "out")


def test_refuses_an_unknown_merge(base, tmp_path):
    with pytest.raises(ValueError, match="into='quantized': expected one of original, dequantized"):
        export_merged(base, make_adapter(), tmp_path / "out", into="quantized")


def test_refuses_a_folder_that_is_not_empty(base, tmp_path):
    (tmp_path / "out").mkdir()
    export_merged(base, make_adapter(), tmp_path / "out")  # an empty one is taken
    with pytest.raises(FileExistsError, match=r"out is not empty \(it holds 'LICENSE.txt'\): give a new or empty fol"):
        export_merged(base, make_adapter(), tmp_path / "out")


def test_a_full_disk_is_seen_before_writing(base, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    needed = sum(value.nbytes for value in tensors_of(base).values())
    message = f"{tmp_path}/out needs {needed:,} bytes, its disk has 5,000 free: free some, or choose another"
    with pytest.raises(OSError, match=message) as error:
        export_merged(base, make_adapter(), tmp_path / "out")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"out needs [0-9,]+ bytes, its disk has 5,000 free"):
        export_bnb4(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(base, tmp_path, monkeypatch):
    save, written = shards.save_file, []

    def save_two(tensors, file, metadata):
        if len(written) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        written.append(file)
        save(tensors, file, metadata=metadata)

    monkeypatch.setattr(shards, "save_file", save_two)
    with pytest.raises(OSError, match=r"out needs [0-9,]+ bytes, its disk has [0-9,]+ free: free some") as error:
        export_merged(base, make_adapter(), tmp_path / "out", shard_bytes=60_000)
    assert error.value.errno == errno.ENOSPC
    assert len(written) == 2 and list(tmp_path.iterdir()) == []
