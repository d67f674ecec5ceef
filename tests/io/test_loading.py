"""Loading streams: memory, packed copies, identity."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import QuantSection
from qlora_jax.io.build import abstract_model
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model, resolve_folder
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.nf4 import NF4Tensor, dequantize, quantize
from qlora_jax.quant.rules import rules_for

MEASURE = """
import resource, sys
from pathlib import Path
import jax
from qlora_jax.io import hf
from qlora_jax.io.build import build_model
from qlora_jax.quant.rules import rules_for
jax.block_until_ready(jax.numpy.zeros(1))
small, large = Path(sys.argv[1]), Path(sys.argv[2])
rules = rules_for("nf4")
hf.load_model(small, dtype="bfloat16", rules=rules)  # imports, compilers and thread pools: the process's baseline
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = hf.load_model(large, dtype="bfloat16", rules=rules)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from flax import nnx
stored = sum(a.nbytes for a in jax.tree.leaves(nnx.state(loaded.model)))
print((peak - baseline) * 1024, stored)
"""


def test_peak_memory_is_the_stored_model_and_three_tensors(checkpoint):
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=4096)
    large = checkpoint("llama", dtype="bfloat16", shard="40MB", **sizes)
    small = checkpoint("llama", dtype="bfloat16")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, check=True
    )
    growth, stored = map(int, result.stdout.split())
    largest = 4096 * 1024 * 4
    whole = 4096 * 1024 * 2 * 2 + 6 * (2 * 1024**2 + 2 * 1024 * 512 + 3 * 4096 * 1024) * 2
    assert stored < 0.45 * whole
    assert growth <= stored + 3 * largest, f"{growth=} {stored=} {largest=}"


def test_a_packed_copy_holds_the_same_weights_and_is_the_same_base(checkpoint, tmp_path):
    folder = checkpoint("llama", dtype="bfloat16")
    export_bnb4(folder, tmp_path / "packed")
    fresh = load_model(folder, dtype="bfloat16", rules=rules_for("nf4"))
    stored = load_model(tmp_path / "packed", dtype="bfloat16", rules=rules_for("auto"))
    assert fresh.content_hash == stored.content_hash
    ours, theirs = (m.model.layers.mlp.up_proj.weight.get_value() for m in (fresh, stored))
    assert isinstance(theirs, NF4Tensor)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(dequantize(ours), dequantize(theirs))
    unpacked = load_model(
        tmp_path / "packed", dtype="bfloat16", rules=rules_for("none")
    ).model.layers.mlp.up_proj.weight
    np.testing.assert_array_equal(unpacked.get_value(), dequantize(theirs))


def test_the_identity_follows_every_tensor_and_no_file_layout(checkpoint, tmp_path):
    single, sharded = checkpoint("llama"), checkpoint("llama", shard="40KB")
    identity = load_model(single, dtype="float32", rules=rules_for("none")).content_hash
    assert load_model(sharded, dtype="bfloat16", rules=rules_for("nf4")).content_hash == identity
    assert (
        load_model(checkpoint("llama", dtype="bfloat16"), dtype="float32", rules=rules_for("none")).content_hash
        != identity
    )


def test_a_packed_copy_without_its_record_is_known_by_codes_and_scales(checkpoint, tmp_path):
    export_bnb4(checkpoint("llama"), tmp_path / "packed")
    (tmp_path / "packed" / "qlora_jax.json").unlink()
    first = load_model(tmp_path / "packed", dtype="float32", rules=rules_for("auto")).content_hash
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight.nested_absmax"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_model(tmp_path / "packed", dtype="float32", rules=rules_for("auto")).content_hash != first


@pytest.mark.parametrize("path", ["nowhere/at/all", "./nowhere", ""])
def test_what_is_neither_a_folder_nor_a_hub_name(path):
    with pytest.raises(FileNotFoundError, match="is no folder: give a folder with a Hugging Face model, or ORG/NAME"):
        resolve_folder(path)


@pytest.mark.parametrize("double", [True, False])
def test_embedding_and_output_layer_are_stored_as_asked(checkpoint, double):
    quantization = QuantSection(double=double, embedding="nf4", lm_head="int8")
    model = load_model(checkpoint("llama"), dtype="float32", rules=rules_for("nf4", quantization)).model
    plain = load_model(checkpoint("llama"), dtype="float32", rules=rules_for("none")).model
    table, head = model.embed_tokens.weight.get_value(), model.lm_head.weight.get_value()
    assert isinstance(table, NF4Tensor) and table.double == double and isinstance(head, Int8Tensor)
    shapes = abstract_model(model.config, dtype="float32", rules=rules_for("nf4", quantization))
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, shapes)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_array_equal(
        dequantize(table), dequantize(quantize(plain.embed_tokens.weight.get_value(), double=double))
    )
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(model.logits(plain.hidden(tokens)), plain(tokens), atol=0.02)


def test_a_tied_table_is_stored_once(checkpoint):
    quantization = QuantSection(embedding="int8", lm_head="int8")
    model = load_model(checkpoint("llama-tied"), dtype="float32", rules=rules_for("nf4", quantization)).model
    assert model.lm_head is None
    [table] = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.dtype == jnp.int8]
    assert table.shape == (160, 64)


@pytest.mark.parametrize("embedding", ["none", "int8"])
def test_a_tied_table_cannot_be_stored_in_two_ways(checkpoint, embedding):
    quantization = QuantSection(embedding=embedding, lm_head="nf4")
    with pytest.raises(ValueError, match="lm_head='nf4': .* stored once.*: set quant.embedding='nf4' .now '"):
        load_model(checkpoint("llama-tied"), dtype="float32", rules=rules_for("nf4", quantization))


@pytest.mark.parametrize("field", ["embedding", "lm_head"])
def test_nf4_needs_whole_blocks_in_a_row(checkpoint, field):
    folder = checkpoint("llama", hidden_size=96)
    load_model(folder, dtype="float32", rules=rules_for("nf4", QuantSection(**{field: "int8"})))
    message = rf"quant.{field} in NF4 needs rows of a multiple of 64 elements, this matrix is \(160, 96\): store it"
    with pytest.raises(ValueError, match=message):
        load_model(folder, dtype="float32", rules=rules_for("nf4", QuantSection(**{field: "nf4"})))


def test_an_unknown_storage_is_named():
    with pytest.raises(ValueError, match="embedding='int4': expected 'none' or 'nf4' or 'int8'"):
        QuantSection(embedding="int4")
