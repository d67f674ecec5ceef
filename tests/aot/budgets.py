"""The one table of what compiled code may cost. A kernel or a step is a row; `make test-aot` prints what each takes."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import kernels
from qlora_jax.config import Config, QuantSection, load_config
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.kernels.tiles import Tiles, tiles_for
from qlora_jax.memory.decode_step import abstract_decode_step
from qlora_jax.memory.targets import GPUS
from qlora_jax.memory.train_step import abstract_train_step
from qlora_jax.models.cache import empty_cache
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor
from qlora_jax.quant.nf4.tensor import packed_shapes
from qlora_jax.quant.rules import packed
from qlora_jax.serve.runner import SMALLEST_PIECE, Programs, empty_stacks, idle_rows, served
from tests.aot.calls import MOSAIC, TRITON
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
      weights: of a GPU: decoded by one thread in one turn of the hot loop, or in all if the kernel has no loop.
      sass: most instructions of the hot loop (or of the whole kernel) per weight.
      call: TRITON or MOSAIC, which XLA's module calls it by.
    """

    name: str
    shape: str
    build: Callable[[], Program]
    weights: Callable[[str], float]
    sass: float
    gpus: tuple[str, ...] = ALL
    call: str = TRITON

    def instructions_per_weight(self, kernel: Kernel, gpu: str) -> float:
        return len(kernel.hot) / self.weights(gpu)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBudget:
    """A whole step, as one minor version of JAX compiles it: their temporaries differ by up to 20 %.

    Attributes:
      calls: the names of the Pallas kernels that have to be in it.
      temporaries: most megabytes (10⁶ bytes) of temporary device memory, by GPU.
    """

    name: str
    jax: str
    build: Callable[[], Program]
    temporaries: dict[str, float]
    calls: frozenset[str] = frozenset()


def config_7b() -> Config:
    return load_config(Path(__file__).parents[2] / "configs" / "7b.py", ["--config.model.weights=random"])


def train_step() -> Program:
    """1 x 512 tokens, rank 8 on the query and value projections."""
    return abstract_train_step(config_7b())


def decode_step() -> Program:
    """One text, a cache of 1,024 tokens."""
    return abstract_decode_step(config_7b(), batch=1, places=1024)


def serve_step() -> Program:
    """A token for 16 texts of at most 1,024, each with one of 8 adapters of rank 16; their cache alone takes 8.7 GB."""
    geometry = read_config(Path(config_7b().model.geometry))
    graphdef, base = nnx.split(abstract_model(geometry, rules=packed(QuantSection())))
    cache = jax.eval_shape(lambda: empty_cache(geometry, 16, 1024 + SMALLEST_PIECE, "bfloat16"))
    stacks = jax.eval_shape(lambda: empty_stacks(served(geometry, 16, 0), 9, "bfloat16"))
    rows = jax.eval_shape(lambda: idle_rows(16, cache.layers["layers"].k.shape[3]))
    return Programs(graphdef).decode, ((base,), stacks, cache.layers, rows.tokens, rows)


def stack(n: int = 4096, k: int = 4096, dtype: str = "bfloat16") -> NF4Tensor:
    return packed_shapes((n, k), dtype, double=True, leading=(32,))


INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def dequantize(dtype: str, implementation: str = "auto") -> Program:
    """One layer of a stack, in the dtype that its weights had."""

    @jax.jit
    def function(stack, index):
        with kernels.using(implementation):
            return kernels.dequantize(NF4Layer(stack, index))

    return function, (stack(dtype=dtype), INDEX)


def matmul(tokens: int, dtype: str = "bfloat16", rows: tuple[int, ...] = (4096,)) -> Program:
    """`tokens` rows of x with weights of so many rows, in one launch."""

    @jax.jit
    def function(x, stacks, index):
        return kernels.nf4_matmul_group(x, [NF4Layer(stack, index) for stack in stacks])

    return function, (jax.ShapeDtypeStruct((tokens, 4096), jnp.dtype(dtype)), [stack(n) for n in rows], INDEX)


def tiles_of(gpu: str) -> Tiles:
    major, minor = GPUS[gpu].capability
    return tiles_for(10 * major + minor)


def dequantized_by_a_thread(gpu: str) -> float:
    tiles = tiles_of(gpu).dequantize
    return tiles.elements / tiles.warps / 32


def decoded_in_a_turn(tokens: int) -> Callable[[str], float]:
    """Weights that a thread of the fused kernel decodes in one turn of its loop, by GPU."""

    def weights(gpu: str) -> float:
        tiles = tiles_of(gpu).for_tokens(tokens)
        assert tiles
        return tiles.rows * 64 * tiles.blocks / tiles.warps / 32

    return weights


def dequantize_row(dtype: str) -> KernelBudget:
    return KernelBudget(
        name="nf4_dequantize",
        shape=f"4096 x 4096, {dtype}",
        build=functools.partial(dequantize, dtype),
        weights=dequantized_by_a_thread,
        sass=9,
    )


def matmul_row(tokens: int, sass: float, **options: Any) -> KernelBudget:
    return KernelBudget(
        name="nf4_matmul",
        shape=f"{tokens} x 4096" + "".join(f", {value}" for value in options.values()),
        build=functools.partial(matmul, tokens, **options),
        weights=decoded_in_a_turn(tokens),
        sass=sass,
    )


KERNELS: tuple[KernelBudget, ...] = (
    *map(dequantize_row, ("bfloat16", "float16", "float32")),
    matmul_row(1, 5),
    matmul_row(1, 5, dtype="float16"),
    matmul_row(1, 5, rows=(4096, 1024, 1024)),  # query, key and value projections of grouped attention
    matmul_row(16, 6),
    matmul_row(32, 7),
    matmul_row(64, 10),
    KernelBudget(
        name="nf4_dequantize",
        shape="4096 x 4096, Mosaic",
        build=functools.partial(dequantize, "bfloat16", "mosaic"),
        weights=lambda gpu: 64 * 64 / 128,  # blocks of a program times a block's weights, in one warpgroup
        sass=20,
        gpus=("h200",),  # the backend needs Hopper
        call=MOSAIC,
    ),
)

# What was measured, and 2 % more.
STEPS = (
    StepBudget(
        name="7b serve step",
        jax="0.10",
        build=serve_step,
        calls=frozenset({"nf4_matmul"}),
        temporaries={"h200": 14.8, "rtx4090": 12.8},
    ),
    StepBudget(
        name="7b train step",
        jax="0.10",
        build=train_step,
        calls=frozenset({"nf4_dequantize"}),
        temporaries={"h200": 343.8, "a100": 345.4, "rtx4090": 345.5, "rtx3090": 345.4},
    ),
    StepBudget(
        name="7b train step",
        jax="0.12",
        build=train_step,
        calls=frozenset({"nf4_dequantize"}),
        temporaries={"h200": 424.4, "a100": 362.5, "rtx4090": 362.6, "rtx3090": 362.5},
    ),
    *(
        StepBudget(
            name="7b decode step",
            jax=version,
            build=decode_step,
            calls=frozenset({"nf4_matmul"}),
            temporaries=dict.fromkeys(ALL, 0.5),
        )
        for version in ("0.10", "0.12")
    ),
)
