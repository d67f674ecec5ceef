"""One configuration for models of both kinds: with an output layer of their own, and with the embedding for one."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from qlora_jax.config import Config, ModelSection, QuantSection
from qlora_jax.io.build import check_storage
from qlora_jax.training.setup import embedding_on_host, for_geometry, storage_rules
from tests import tiny_config

UNTIED = dataclasses.replace(tiny_config.CONFIG, tie_embeddings=False)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def make(embedding: str, head: str, table: str, method: str = "qlora") -> Config:
    return Config(
        method=method, model=ModelSection(embedding=embedding), quant=QuantSection(lm_head=head, embedding=table)
    )


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize(
    "given, used, said",
    [
        (
            ("host", "int8", "none"),
            ("device", "int8", "int8"),
            "model.embedding=device and quant.embedding=int8 is used",
        ),
        (("host", "none", "none"), ("device", "none", "none"), "model.embedding=device is used"),
        (("device", "nf4", "none"), ("device", "nf4", "nf4"), "quant.embedding=nf4 is used"),
        (("device", "int8", "int8"), ("device", "int8", "int8"), ""),
        (("device", "none", "int8"), ("device", "none", "int8"), ""),
        (("device", "none", "none"), ("device", "none", "none"), ""),
    ],
)
def test_a_tied_table_is_stored_once(given, used, said, method, caplog):
    found = for_geometry(make(*given, method), TIED)
    check_storage(TIED, storage_rules(found), embedding_on_host(found))
    if method == "qlora":
        assert found == make(*used, method)
        assert caplog.messages[-1].endswith(said) if said else caplog.messages == []
    assert for_geometry(make(*given, method), UNTIED) == make(*given, method)


def test_two_storages_for_one_table_are_refused():
    found = for_geometry(make("device", "int8", "nf4"), TIED)
    with pytest.raises(ValueError, match="quant.lm_head='int8': .*set quant.embedding='int8'"):
        check_storage(TIED, storage_rules(found), embedding_on_host(found))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_runs_on_a_tied_model(file):
    spec = importlib.util.spec_from_file_location("shipped", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = for_geometry(module.config, TIED)
    check_storage(TIED, storage_rules(found), embedding_on_host(found))
