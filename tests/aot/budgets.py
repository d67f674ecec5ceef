"""The one table of what compiled code may cost. A kernel or a step is a row; `make test-aot` prints what each takes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.memory.decode_step import abstract_decode_step
from qlora_jax.memory.train_step import abstract_train_step
from qlora_jax.train.config import Config, load_config
from tests.aot.calls import TRITON
from tests.aot.sass import Kernel

ALL = ("h200", "a100", "rtx4090", "rtx3090")
# A jitted function and its abstract arguments.
Program = tuple[Any, tuple]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelBudget:
    """A kernel at one shape.

    Attributes:
      name: the kernel's `name=`.
      shape: for the table.
      build: makes the program that calls it.
      weights: decoded by one thread in one turn of the hot loop, or by one thread in all if the kernel has no loop.
        A function of the kernel where the compiler decides that, by unrolling.
      sass: most instructions of the hot loop (or of the whole kernel) per weight.
      call: TRITON or MOSAIC, which XLA's module calls it by.
    """

    name: str
    shape: str
    build: Callable[[], Program]
    weights: float | Callable[[Kernel], float]
    sass: float
    gpus: tuple[str, ...] = ALL
    call: str = TRITON

    def instructions_per_weight(self, kernel: Kernel) -> float:
        weights = self.weights(kernel) if callable(self.weights) else self.weights
        return len(kernel.hot) / weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBudget:
    """A whole step, as one minor version of JAX compiles it: their temporaries differ by up to 20 %.

    Attributes:
      calls: the names of the Pallas kernels that have to be in it.
      temporaries: most megabytes (10⁶ bytes) of temporary device memory, by GPU.
      spilling: GPUs for which a kernel of XLA's own spills, so that spills cannot be forbidden; the row says which.
    """

    name: str
    jax: str
    build: Callable[[], Program]
    temporaries: dict[str, float]
    calls: frozenset[str] = frozenset()
    spilling: frozenset[str] = frozenset()


def config_7b() -> Config:
    return load_config(Path(__file__).parents[2] / "configs" / "7b.py", ["--config.model.weights=random"])


def train_step() -> Program:
    """1 x 512 tokens, rank 8 on the query and value projections."""
    return abstract_train_step(config_7b())


def decode_step() -> Program:
    """One text, a cache of 1,024 tokens."""
    return abstract_decode_step(config_7b(), batch=1, slots=1024)


# One line per kernel and shape, such as
#   KernelBudget(name="nf4_dequantize", shape="4096 x 4096", build=dequantize_4096, weights=32, sass=9),
KERNELS: tuple[KernelBudget, ...] = ()

# What was measured, and 2 % more. Where the train step spills, it is the gradient of attention's softmax, a fusion
# that XLA makes over rows of 512 scores.
STEPS = (
    StepBudget(
        name="7b train step",
        jax="0.10",
        build=train_step,
        temporaries={"h200": 465.5, "a100": 465.2, "rtx4090": 462.3, "rtx3090": 465.3},
        spilling=frozenset({"a100", "rtx3090"}),
    ),
    StepBudget(
        name="7b train step",
        jax="0.12",
        build=train_step,
        temporaries={"h200": 539.9, "a100": 462.2, "rtx4090": 462.3, "rtx3090": 462.3},
        spilling=frozenset({"h200", "a100", "rtx3090"}),
    ),
    StepBudget(
        name="7b decode step",
        jax="0.10",
        build=decode_step,
        temporaries={"h200": 677.4, "a100": 665.6, "rtx4090": 665.6, "rtx3090": 665.6},
    ),
    StepBudget(
        name="7b decode step",
        jax="0.12",
        build=decode_step,
        temporaries={"h200": 781.5, "a100": 665.6, "rtx4090": 665.6, "rtx3090": 665.6},
    ),
)
