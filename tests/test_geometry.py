"""The shipped geometries and configs: the models' published sizes and the adapters' exact sizes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from qlora_jax.config import load_config

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
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_builds_the_published_size(name):
    settings = json.loads((CONFIGS / "geometry" / f"{name}.json").read_text())
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert [type(model).__name__] == settings["architectures"]
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]


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
