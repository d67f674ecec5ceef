"""Every kernel of the table is in the compiled program, spills nothing and keeps to its instructions per weight."""

import pytest

from qlora_jax.memory.compile import compile_for, device_bytes
from tests.aot import sass
from tests.aot.budgets import KERNELS, KernelBudget

CASES = [pytest.param(row, gpu, id=f"{row.title}-{gpu}") for row in KERNELS for gpu in row.gpus]
pytestmark = pytest.mark.usefixtures("cuda_wheels")


@pytest.mark.parametrize(("row", "gpu"), CASES)
def test_kernel(row: KernelBudget, gpu, measured, tmp_path):
    function, arguments = row.build()
    if not sass.available():  # CUDA 12's plugin: NVIDIA ships no disassembler for it as a wheel
        compiled = compile_for(function, arguments, gpu, forbid_spills=True)
        measured(what=row.title, gpu=gpu, temporaries=megabytes(compiled))
        assert called(compiled, row)
        return
    compiled, kernels = sass.compile_kernels(function, arguments, gpu, tmp_path)
    kernel = next((k for k in kernels if k.name == row.name), None)
    assert kernel, f"no kernel {row.name!r} among {[k.name for k in kernels]}"
    per_weight = row.instructions_per_weight(kernel, gpu)
    measured(
        what=row.title,
        gpu=gpu,
        registers=str(kernel.registers),
        temporaries=megabytes(compiled),
        budget=f"{row.sass:g} SASS/weight",
        **{"SASS/weight": f"{per_weight:.2f}"},
    )
    assert called(compiled, row)
    assert (kernel.spilled, kernel.local_memory) == (0, 0)
    assert per_weight <= row.sass


def called(compiled, row: KernelBudget) -> bool:
    """Whether XLA's module still holds the kernel's call."""
    return f'custom_call_target="{row.call}"' in compiled.as_text()


def megabytes(compiled) -> str:
    return f"{device_bytes(compiled)['temporaries'] / 1e6:.1f} MB"
