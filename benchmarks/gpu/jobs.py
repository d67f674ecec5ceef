"""What runs: parts, their jobs in order of importance, and which function a job is.

Every job is a process of its own, so that a peak of memory is one program's and a crash costs one job's rows.
"""

import functools
import importlib
from collections.abc import Callable

from benchmarks.gpu.context import Context

CHECKS = {"exact": "exact:run", "ceilings": "ceilings:run"}
PARTS = {
    "kernels": {
        "kernels.dequantize": "kernels:run_dequantize",
        "kernels.fused": "kernels:run_fused",
        "kernels.group": "kernels:run_group",
    },
    "train": {
        "train.qlora": "train:run_qlora",
        "train.lora": "train:run_lora",
        "train.forward": "train:run_forward",
        "train.load": "load:run",
        "train.small": "train:run_small",
        "train.attention": "train:run_attention",
    },
    "decode": {"decode.nf4": "decode:run_packed", "decode.bf16": "decode:run_plain"},
    "peers": {
        "peers.kernels": "peers:run_kernels",
        "peers.train_bf16": "peers:run_train:bfloat16, sdpa",
        "peers.train_recipe": "peers:run_train:recipe, sdpa",
        "peers.decode": "peers:run_decode",
        "peers.flash_bf16": "peers:run_train:bfloat16, flash_attention_2",
        "peers.flash_recipe": "peers:run_train:recipe, flash_attention_2",
        "peers.unsloth": "peers:run_unsloth",
    },
    "large": {"large.65b": "large:run"},
}
JOBS = CHECKS | {job: target for jobs in PARTS.values() for job, target in jobs.items()}


def function_of(job: str) -> Callable[[Context], None]:
    """The function of a job, its module imported now and not before."""
    module, name, *arguments = JOBS[job].split(":")
    function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    return functools.partial(_call, function, arguments)


def _call(function: Callable, arguments: list[str], context: Context) -> None:
    function(context, *arguments)
