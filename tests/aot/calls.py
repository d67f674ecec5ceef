"""Which Pallas kernels a compiled program calls."""

import re

import jax

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
CALL = re.compile(r'custom_call_target="(?P<target>[^"]+)".*?op_name="[^"]*?(?P<name>[^"/]+)/[^"/]+"')


def pallas_calls(compiled: jax.stages.Compiled) -> set[tuple[str, str]]:
    """(TRITON or MOSAIC, the kernel's `name=`) of every call in XLA's optimized module."""
    calls = {(found["target"], found["name"]) for found in CALL.finditer(compiled.as_text())}
    return {(target, name) for target, name in calls if target in (TRITON, MOSAIC)}
