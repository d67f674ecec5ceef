"""Embeddings and output layers, stored once, twice or as two tables: what transformers makes of the same folder."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.hf import load_model, read_config
from qlora_jax.io.save import write_model
from qlora_jax.quant.rules import rules_for
from tests.io.test_export import make_adapter
from tests.io.torch_model import TOKENS, load, logits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def one_bit(table: np.ndarray) -> np.ndarray:
    changed = table.copy()
    changed[3, 5] *= 2
    return changed


# What becomes of the tensors, and whether transformers ties the output layer.
CASES = {
    "once": (lambda t: t, True),
    "a copy": (lambda t: {**t, HEAD: t[EMBEDDING]}, True),
    "a copy in 32 bits": (lambda t: {**t, HEAD: t[EMBEDDING].astype(np.float32)}, True),
    "only as the head": (lambda t: {HEAD if n == EMBEDDING else n: v for n, v in t.items()}, True),
    "another head": (lambda t: {**t, HEAD: t[EMBEDDING][::-1] * np.array(3, t[EMBEDDING].dtype)}, False),
    "a head that differs in one value": (lambda t: {**t, HEAD: one_bit(t[EMBEDDING])}, False),
}


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    made = {}
    for name, (change, _) in CASES.items():
        made[name] = shutil.copytree(checkpoint("llama-tied", dtype="bfloat16"), tmp_path_factory.mktemp("t") / "model")
        file = made[name] / "model.safetensors"
        save_file({n: np.ascontiguousarray(v) for n, v in change(load_file(file)).items()}, file, {"format": "pt"})
    return made


def our_logits(folder) -> np.ndarray:
    return np.asarray(load_model(folder, dtype="float32", rules=rules_for("none")).model(jnp.asarray(TOKENS)))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_exports_are_those_of_transformers(name, folders, tmp_path):
    folder, tied = folders[name], CASES[name][1]
    theirs = load(folder)
    assert (theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()) == tied
    np.testing.assert_allclose(our_logits(folder), logits(theirs), atol=1e-5)
    assert read_config(folder).tie_embeddings == tied

    export_bnb4(folder, tmp_path / "packed")
    export_merged(folder, make_adapter(), tmp_path / "merged", dtype="float32")
    write_model(load_model(folder, dtype="float32", rules=rules_for("none")).model, tmp_path / "full", folder)
    for written in ("packed", "merged", "full"):
        tensors = load_file(tmp_path / written / "model.safetensors")
        assert (HEAD in tensors) != tied and EMBEDDING in tensors
        assert json.loads((tmp_path / written / "config.json").read_text())["tie_word_embeddings"] == tied
    np.testing.assert_allclose(logits(load(tmp_path / "full")), logits(theirs), atol=1e-5)
    np.testing.assert_allclose(our_logits(tmp_path / "merged"), logits(load(tmp_path / "merged")), atol=1e-5)


def test_a_configuration_that_ties_nothing_needs_its_head(folders, tmp_path):
    shutil.copytree(folders["once"], tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="lm_head.weight' first .config.json has tie_word_embeddings=false"):
        load_model(tmp_path / "model", dtype="float32", rules=rules_for("none"))
