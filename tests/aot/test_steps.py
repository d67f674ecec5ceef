"""The whole 7B steps compile for every GPU of the table, within their temporary memory."""

import jax
import pytest

from qlora_jax.device.facts import device_bytes
from qlora_jax.memory.compile import compile_for
from tests.aot.budgets import STEPS, StepBudget
from tests.aot.calls import pallas_calls

ROWS = [row for row in STEPS if jax.__version__.startswith(f"{row.jax}.")]
CASES = [pytest.param(row, gpu, id=f"{row.name}-{gpu}") for row in ROWS for gpu in row.temporaries]
pytestmark = pytest.mark.usefixtures("cuda_wheels")


def test_this_jax_has_budgets():
    assert ROWS, f"jax {jax.__version__} has no StepBudget: measure its temporaries and add rows"


@pytest.mark.parametrize(("row", "gpu"), CASES)
def test_step(row: StepBudget, gpu, measured):
    compiled = compile_for(*row.build(), gpu, forbid_spills=True)
    temporaries = device_bytes(compiled)["temporaries"] / 1e6
    budget = row.temporaries[gpu]
    measured(what=row.name, gpu=gpu, temporaries=f"{temporaries:.1f} MB", budget=f"{budget} MB of temporaries")
    assert row.calls <= {name for _, name in pallas_calls(compiled)}
    assert temporaries <= budget
