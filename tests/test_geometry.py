"""The shipped geometries and configs: the models' published sizes and the adapters' exact sizes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from qlora_jax.config import load_config
from qlora_jax.io.model_config import parse_config
from qlora_jax.models import count_parameters

CONFIGS = Path(__file__).parents[1] / "configs"

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "phi-4": 14_659_507_200,
    "gemma-4-12b": 11_907_350_272,
    "gemma-4-26b-a4b": 25_233_141_760,
    "gpt-oss-20b": 20_914_757_184,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-35b-a3b": 34_660_610_688,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_builds_the_published_size(name):
    settings = json.loads((CONFIGS / "geometry" / f"{name}.json").read_text())
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert [type(model).__name__] == settings["architectures"]
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    # A layer's scalar is a buffer there.
    scalars = sum(buffer.numel() for path, buffer in model.named_buffers() if path.endswith("layer_scalar"))
    assert count_parameters(parse_config(settings)) == PARAMETERS[name] + scalars


def test_every_geometry_is_checked():
    assert {path.stem for path in (CONFIGS / "geometry").glob("*.json")} == set(PARAMETERS)


# The bases are trained by scripts/make_demo_base.py, with data that the script makes; see tests/test_demo.py.
USER_CONFIGS = sorted(path for path in CONFIGS.glob("*.py") if not path.stem.endswith("_base"))


@pytest.mark.parametrize("path", USER_CONFIGS, ids=lambda path: path.name)
def test_configs_load_and_name_their_command(path):
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    assert f"Command: python scripts/train.py --config configs/{path.name}" in path.read_text()
    assert not config.model.geometry or Path(config.model.geometry).is_file()
