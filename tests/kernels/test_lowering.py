"""Every kernel of the table is lowered for every architecture, by whatever JAX runs this; no CUDA wheels are needed."""

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax.memory.targets import ARCHITECTURES
from tests.aot.budgets import KERNELS, KernelBudget


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernel_is_lowered(row: KernelBudget, capability):
    kind = ARCHITECTURES[capability].device_kind
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    function, arguments = row.build()
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert row.call in lowered.as_text()
