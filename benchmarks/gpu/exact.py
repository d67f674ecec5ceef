"""Is every implementation right on this device? Nothing that is not is timed.

The reference is computed on the host's CPU, where the tests hold it to bitsandbytes bit for bit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import api
from benchmarks.gpu.context import Context, reason
from benchmarks.gpu.names import check_name
from qlora_jax.quant.nf4 import NF4Tensor, quantize
from qlora_jax.quant.nf4 import dequantize as reference

# Largest error of an output, in units of the outputs' root mean square. Levels and outputs of the fused kernel are
# rounded to bfloat16 (2⁻⁹ relative each): over 10⁵ outputs that reaches 0.03; a wrong code or scale gives about 1.
TOLERANCE = 0.05
KINDS = [(dtype, double) for dtype in ("bfloat16", "float16", "float32") for double in (True, False)]
# K no multiple of 64 (flat layout), N odd, a partial last block, tiles that do not fill, and a real layer's.
SHAPES = ((64, 1000), (33, 128), (7, 65), (257, 576), (129, 11008))
FULL_CROSS = (256, 512)
REAL = (4096, 4096)
STACK = (3, 96, 256)
FUSED_ROWS = (1, 16, 33, 128)
FUSED_SHAPES = ((384, 11008), (4096, 4096))
SMALL_PRODUCT = (256, 512)


class Case(NamedTuple):
    name: str
    weight: NF4Tensor
    expected: np.ndarray


def on_host():
    """A context in which JAX computes on the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def random_weight(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Normal values whose rows differ in size by up to 100, one of them zero."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * 10 ** rng.uniform(-2, 0, (*shape[:-1], 1)) * 0.1
    weight[..., shape[-2] // 2, :] = 0
    return weight.astype(jnp.dtype(dtype))


def make_case(shape: tuple[int, ...], dtype: str, double: bool, seed: int) -> Case:
    """A weight packed and unpacked on the host."""
    with on_host():
        weight = jnp.asarray(random_weight(shape, dtype, seed))
        pack = lambda w: quantize(w, double=double)  # noqa: E731
        packed = jax.vmap(pack)(weight) if weight.ndim == 3 else pack(weight)
        expected = np.asarray(jax.jit(reference)(packed))
    name = f"{'x'.join(map(str, shape))} {dtype} {'double' if double else 'single'}"
    return Case(name, jax.tree.map(np.asarray, packed), expected)


def cases(smoke: bool) -> Iterator[Case]:
    """Every kind on one shape and one on every other, two on the stack; a smoke run leaves most out."""
    if smoke:
        yield from (make_case(FULL_CROSS, *KINDS[0], 0), make_case((33, 100), *KINDS[3], 1))
        yield make_case(STACK, *KINDS[4], 2)
        return
    yield from (make_case(FULL_CROSS, *kind, i) for i, kind in enumerate(KINDS))
    yield from (make_case(shape, *KINDS[i % len(KINDS)], i) for i, shape in enumerate(SHAPES))
    yield from (make_case(STACK, *KINDS[i], i) for i in (0, 5))
    yield make_case(REAL, "bfloat16", True, 9)


def poison(shape: tuple[int, ...], dtype) -> None:
    """Leaves NaN in memory that the next result of this size is likely to get: what a kernel skips then shows."""
    jax.block_until_ready(jnp.full(shape, jnp.nan, dtype)).delete()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    kind = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(kind), b.view(kind))


def check(context: Context, operation: str, implementation: str, run: Callable[[], tuple[int, str | None]]) -> None:
    """Records how many cases are right. `run` returns their number and the first wrong one."""
    name = check_name(operation, implementation)
    try:
        right, wrong = run()
    except (api.NotHere, NotImplementedError) as error:
        context.missing(name, "cases", f"not measured: {str(error) or type(error).__name__}")
        return
    except Exception as error:  # a kernel that does not even run is wrong
        right, wrong = 0, reason(error)
    context.row(
        name,
        right,
        "cases",
        reference=right if wrong is None else right + 1,
        bar=(">=", 1),
        note=None if wrong is None else f"wrong: {wrong}",
    )
    if wrong is not None:
        context.results.row(name)["passed"] = False  # also where not even one case is right, and there is no ratio
        context.results.save()


def dequantize_right(implementation: str, found: list[Case]) -> tuple[int, str | None]:
    """Bit for bit, in the weight's own dtype. A dtype that the implementation refuses is left out, unless all are."""
    right, refused = 0, None
    for case in found:
        try:
            result = dequantized(implementation, case)
        except (api.NotHere, NotImplementedError) as error:
            refused = error
            continue
        if not same_bits(result, case.expected):
            return right, f"{case.name} differs in {np.sum(result != case.expected)} of {result.size} elements"
        right += 1
    if not right and refused:
        raise refused
    return right, None


def dequantized(implementation: str, case: Case) -> np.ndarray:
    weight = jax.device_put(case.weight)
    poison(case.expected.shape, case.expected.dtype)
    with api.using(implementation):
        return np.asarray(jax.jit(api.dequantize)(weight))


def error_of(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    """The largest error of y = x · Wᵀ in units of the outputs' root mean square; the product is in float64."""
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    return float(np.abs(y.astype(np.float64) - exact).max() / np.sqrt(np.mean(exact**2)))


def products(smoke: bool) -> Iterator[tuple[str, np.ndarray, Case]]:
    """(name, x `[M, K]`, stacked weights) of the matmul checks."""
    for i, shape in enumerate([SMALL_PRODUCT] if smoke else FUSED_SHAPES):
        case = make_case((2, *shape), "bfloat16", True, 20 + i)
        for rows in FUSED_ROWS[:1] if smoke else FUSED_ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, shape[1])).astype(jnp.bfloat16)
            yield f"{shape[0]}x{shape[1]} M={rows}", x, case


def matmul_right(multiply: Callable, found: list) -> tuple[int, str | None]:
    """Within TOLERANCE, on the second matrix of a stack."""
    for number, (name, x, case) in enumerate(found):
        stack = jax.device_put(case.weight)
        poison((x.shape[0], case.expected.shape[1]), x.dtype)
        y = np.asarray(jax.jit(multiply)(jnp.asarray(x), stack, jnp.int32(1)))
        error = error_of(y, x, case.expected[1])
        if not error <= TOLERANCE:  # NaN is wrong too
            return number, f"{name} is off by {error:.3g}, tolerance {TOLERANCE}"
    return len(found), None


def backward(dy, stack, layer):
    """dx of the model's matmul, as a product of dy `[M, N]` and W."""
    x = jnp.zeros((dy.shape[0], stack.shape[1]), dy.dtype)
    return jax.vjp(lambda x: api.matmul(x, api.layer_of(stack, layer)), x)[1](dy)[0]


def transposed(found: list) -> list:
    """The cases of the backward pass: dy has N columns, and the expected matrix is Wᵀ."""
    return [
        (name, x[:, : case.expected.shape[1]], case._replace(expected=case.expected.transpose(0, 2, 1)))
        for name, x, case in found
        if x.shape[1] >= case.expected.shape[1]
    ]


def run(context: Context) -> None:
    """Checks everything that any part times."""
    found, multiplied = list(cases(context.sizes.smoke)), list(products(context.sizes.smoke))
    for implementation in api.IMPLEMENTATIONS:
        check(context, "dequantize", implementation, lambda name=implementation: dequantize_right(name, found))
    check(context, "fused matmul", "pallas", lambda: matmul_right(api.fused, multiplied))
    forward = lambda x, stack, layer: api.matmul(x, api.layer_of(stack, layer))  # noqa: E731
    check(context, "matmul", "auto", lambda: matmul_right(forward, multiplied))
    check(context, "matmul backward", "auto", lambda: matmul_right(backward, transposed(multiplied)))
    first = lambda stack: api.layer_of(stack, jnp.int32(0))  # noqa: E731
    grouped = lambda x, stack, layer: api.group(x, [first(stack), api.layer_of(stack, layer)])[1]  # noqa: E731
    check(context, "grouped matmul", "auto", lambda: matmul_right(grouped, multiplied))
