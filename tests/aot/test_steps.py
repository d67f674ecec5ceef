"""The whole 7B steps compile for every GPU of the table, within their temporary memory."""

import pytest

from qlora_jax.memory.compile import compile_for, device_bytes
from tests.aot.budgets import STEPS, StepBudget

CASES = [pytest.param(row, gpu, id=f"{row.name}-{gpu}") for row in STEPS for gpu in row.temporaries]
pytestmark = pytest.mark.usefixtures("cuda_wheels")


@pytest.mark.parametrize(("row", "gpu"), CASES)
def test_step(row: StepBudget, gpu, measured):
    compiled = compile_for(*row.build(), gpu, forbid_spills=gpu not in row.spilling)
    temporaries, budget = device_bytes(compiled)["temporaries"], row.temporaries[gpu]
    budget_text = f"{budget / 1e6:.1f} MB of temporaries"
    measured(what=row.name, gpu=gpu, temporaries=f"{temporaries / 1e6:.1f} MB", budget=budget_text)
    assert temporaries <= budget


@pytest.mark.parametrize("gpu", [gpu for row in STEPS for gpu in row.spilling][:1])
def test_the_exemption_from_spills_is_still_needed(gpu):
    row = next(row for row in STEPS if gpu in row.spilling)
    with pytest.raises(Exception, match="register spilling"):
        compile_for(*row.build(), gpu, forbid_spills=True)
