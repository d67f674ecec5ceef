"""The comparison of docs/quality.md that is made on a GPU: training its base and its three methods compile for one."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from qlora_jax.compare.methods import MAIN
from qlora_jax.config import load_config
from qlora_jax.device.facts import device_bytes
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.train_step import abstract_train_step

ROOT = Path(__file__).parents[2]
LARGE = load_config(ROOT / "configs" / "large.py")
RUNS = {"the base": load_config(ROOT / "configs" / "large_base.py"), **{one.name: one.change(LARGE) for one in MAIN}}
pytestmark = pytest.mark.usefixtures("cuda_wheels")


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    file = tmp_path_factory.mktemp("large") / "config.json"
    file.write_text(json.dumps(runpy.run_path(str(ROOT / "scripts" / "make_demo_base.py"))["LARGE"].geometry))
    return str(file)


@pytest.mark.parametrize("name", RUNS)
def test_a_train_step_compiles_and_fits_the_memory_that_its_config_names(name, geometry):
    config = RUNS[name]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, geometry=geometry))
    step, arguments = abstract_train_step(config)
    assert device_bytes(compile_for(step, arguments, "rtx4090"))["peak"] < 3.3e9  # 4 GB without the CUDA context
