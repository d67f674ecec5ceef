"""Every kernel of the table is lowered for every architecture, by whatever JAX runs this; no CUDA wheels are needed."""

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax.memory.targets import ARCHITECTURES, GPUS
from tests.aot.budgets import KERNELS, KernelBudget

CASES = [
    pytest.param(
        row, ARCHITECTURES[capability].device_kind, id="{}-{}-sm_{}{}".format(row.name, row.shape, *capability)
    )
    for row in KERNELS
    for capability in sorted({GPUS[gpu].capability for gpu in row.gpus})
]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_kernel_is_lowered(row: KernelBudget, kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    function, arguments = row.build()
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert row.call in lowered.as_text()
