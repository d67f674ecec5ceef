"""Every kernel of the table is in the compiled program, spills nothing and keeps to its instructions per weight."""

import pytest

from qlora_jax.device.facts import device_bytes
from qlora_jax.memory.compile import compile_for
from tests.aot import sass
from tests.aot.budgets import KERNELS, KernelBudget
from tests.aot.calls import pallas_calls

CASES = [pytest.param(row, gpu, id=f"{row.name}-{row.shape}-{gpu}") for row in KERNELS for gpu in row.gpus]
pytestmark = pytest.mark.usefixtures("cuda_wheels")


@pytest.mark.parametrize(("row", "gpu"), CASES)
def test_kernel(row: KernelBudget, gpu, measured, tmp_path):
    cells = {"what": f"{row.name} {row.shape}", "gpu": gpu}
    function, arguments = row.build()
    if not sass.available():
        compiled = compile_for(function, arguments, gpu, forbid_spills=True)
        measured(**cells, temporaries=megabytes(compiled))
        assert (row.call, row.name) in pallas_calls(compiled)
        return
    compiled, kernels = sass.compile_kernels(function, arguments, gpu, tmp_path)
    assert (row.call, row.name) in pallas_calls(compiled)
    (kernel,) = [kernel for kernel in kernels if kernel.name in (row.name, f"{row.name}_mosaic_gpu_kernel")]
    per_weight = row.instructions_per_weight(kernel, gpu)
    cells |= {"SASS/weight": f"{per_weight:.2f}", "registers": str(kernel.registers)}
    measured(**cells, temporaries=megabytes(compiled), budget=f"{row.sass:g} SASS/weight")
    assert (kernel.spilled, kernel.local_memory) == (0, 0)
    assert per_weight <= row.sass


def megabytes(compiled) -> str:
    return f"{device_bytes(compiled)['temporaries'] / 1e6:.1f} MB"
