"""Tiles of rows sorted by expert, against the dense definition: values, derivatives, and what is ever in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax.kernels.experts import combine, expert_matmul, gather, per_tile, reference, route_rows
from qlora_jax.kernels.experts.routing import regroup, side_for, tile_count
from qlora_jax.quant import int8, mxfp4, nf4
from qlora_jax.quant.nf4.tensor import packed_shapes
from qlora_jax.quant.packed import Experts, dequantized, expert

QUANTIZE = {
    "nf4": nf4.quantize,
    "int8": int8.quantize,
    "mxfp4": mxfp4.quantize,
    "plain": lambda weight: weight,
}
# Choices of experts [T, k], with how many experts there are.
ROUTINGS = {
    "even": (jnp.array([[0, 1], [2, 3], [1, 0], [3, 2], [2, 0]]), 4),
    "all to one": (jnp.full((37, 1), 2), 5),
    "some without rows": (jnp.array([[4, 1], [1, 4], [4, 1]]), 6),
    "one expert": (jnp.zeros((19, 1), int), 1),
    "one token": (jnp.array([[5, 0, 3]]), 8),
    "random": (jnp.argsort(jax.random.uniform(jax.random.key(5), (67, 8)), axis=1)[:, :3], 8),
}
routings = pytest.mark.parametrize(("index", "experts"), ROUTINGS.values(), ids=ROUTINGS.keys())
N, K = 48, 64


def drawn(seed: int, *shape: int, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def stored(form: str, experts: int, dtype="float32"):
    """(as it is stored, dense) experts `[E, N, K]`."""
    weight = drawn(0, experts, N, K, dtype=dtype) * 0.1
    kept = jax.vmap(QUANTIZE[form])(weight)
    return kept, dequantized(kept)


@routings
@pytest.mark.parametrize("side", [1, 8, None])
def test_every_pair_has_one_place_and_its_tile_has_its_expert(index, experts, side):
    routing = jax.jit(route_rows, static_argnums=(1, 2))(index, experts, side)
    tiles, rows = routing.source.shape
    assert tiles == tile_count(index.size, experts, rows) and rows == (side or side_for(index.size, experts))
    place, source = np.asarray(routing.place).reshape(-1), np.asarray(routing.source).reshape(-1)
    np.testing.assert_array_equal(source[place], np.arange(index.size))
    assert (np.delete(source, place) == index.size).all()
    np.testing.assert_array_equal(np.asarray(routing.expert)[place // rows], np.asarray(index).reshape(-1))
    assert (np.diff(routing.expert) >= 0).all()


def test_no_more_tiles_than_any_routing_needs():
    # Two experts, one of them with a single row: the worst there is.
    assert tile_count(pairs=17, experts=2, side=8) == 3
    assert tile_count(pairs=3, experts=128, side=8) == 3


def test_the_side_holds_an_average_experts_rows():
    assert [side_for(pairs, 8) for pairs in (1, 64, 65, 512, 513, 10**6)] == [8, 8, 16, 64, 128, 128]


def test_tokens_come_and_go():
    index, weights = jnp.array([[2, 0], [0, 1], [2, 1]]), drawn(1, 3, 2)
    routing, x = route_rows(index, 3), drawn(2, 3, 4)
    tiles = gather(x, routing)
    np.testing.assert_array_equal(tiles[0, :2], x[:2])  # expert 0 has tokens 0 and 1
    np.testing.assert_array_equal(tiles[2, :3], jnp.stack([x[0], x[2], jnp.zeros(4)]))
    np.testing.assert_allclose(combine(tiles, weights, routing), x * weights.sum(1)[:, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "index", "experts"),
    [
        *(pytest.param("nf4", *case, id=f"nf4-{name}") for name, case in ROUTINGS.items()),
        *(pytest.param(form, *ROUTINGS["random"], id=form) for form in ("int8", "mxfp4", "plain")),
    ],
)
def test_products_and_derivatives_are_those_of_the_definition(form, index, experts):
    weight, dense = stored(form, experts)
    x, weights = drawn(1, len(index), K), jax.nn.softmax(drawn(2, *index.shape))

    def ours(x, weights):
        routing = route_rows(index, experts)
        return combine(expert_matmul(gather(x, routing), weight, routing), weights, routing)

    def definition(x, weights):
        pairs = jnp.broadcast_to(x[:, None], (*index.shape, K))
        return jnp.einsum("TjN,Tj->TN", reference.expert_matmul(pairs, dense, index), weights)

    y, pull = jax.vjp(jax.jit(ours), x, weights)
    expected, expected_pull = jax.vjp(definition, x, weights)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(pull(jnp.cos(y)), expected_pull(jnp.cos(y)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@routings
def test_plain_experts_and_biases_are_trained_too(index, experts):
    weight, bias, x = stored("plain", experts)[0], drawn(3, experts, N), drawn(1, len(index), K)

    def ours(weight, bias):
        routing = route_rows(index, experts)
        y = expert_matmul(gather(x, routing), weight, routing) + per_tile(bias, routing)[:, None]
        return jnp.sum(jnp.sin(combine(y, jnp.ones(index.shape), routing)))

    def definition(weight, bias):
        pairs = jnp.broadcast_to(x[:, None], (*index.shape, K))
        return jnp.sum(jnp.sin((reference.expert_matmul(pairs, weight, index) + bias[index]).sum(1)))

    got, want = (jax.jit(jax.grad(f, (0, 1)))(weight, bias) for f in (ours, definition))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("form", ["nf4", "mxfp4", "plain"])
def test_in_bfloat16_each_row_is_its_own_product(form):
    index, experts = ROUTINGS["random"]
    weight, dense = stored(form, experts, "bfloat16")
    x, routing = drawn(1, len(index), K, dtype="bfloat16"), route_rows(index, experts)
    y = expert_matmul(gather(x, routing), weight, routing)
    assert y.dtype == jnp.bfloat16
    pairs = jnp.broadcast_to(x[:, None], (*index.shape, K)).astype(jnp.float32)
    expected = reference.expert_matmul(pairs, dense, index)
    got = y.reshape(-1, N)[routing.place].astype(jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-3)


def test_sums_over_tiles_keep_float32():
    """1,024 tiles of ones: a sum in bfloat16 stops at 256."""
    routing = route_rows(jnp.zeros((8192, 1), int), 1, side=8)
    ones = jnp.ones((1, 1), jnp.bfloat16)
    assert float(jax.grad(lambda w: per_tile(w, routing).sum().astype(jnp.float32))(ones)[0, 0]) == 1024
    weight, x = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.ones((8192, 1), jnp.bfloat16)
    grad = jax.grad(lambda w: expert_matmul(gather(x, routing), w, routing).astype(jnp.float32).sum())(weight)
    assert float(grad[0, 0, 0]) == 8192


@pytest.mark.parametrize("form", ["nf4", "plain"])
def test_a_token_does_not_depend_on_the_others(form):
    """Bit for bit while the tiles' side is the same: whoever else is there, and wherever the token stands."""
    weight, _ = stored(form, 4)
    x, index = drawn(1, 30, K), jax.random.randint(jax.random.key(3), (30, 2), 0, 4)

    @jax.jit
    def run(x, index):
        routing = route_rows(index, 4)
        return combine(expert_matmul(gather(x, routing), weight, routing), jnp.full(index.shape, 0.5), routing)

    y = run(x, index)
    others = x.at[1:].set(jnp.nan), index.at[1:].set(index[0])
    np.testing.assert_array_equal(run(*others)[0], y[0])
    order = jax.random.permutation(jax.random.key(4), 30)
    np.testing.assert_array_equal(run(x[order], index[order]), y[order])


def test_rows_move_from_one_routing_to_another():
    index, experts = ROUTINGS["random"]
    x = drawn(1, len(index), K)
    old, new = route_rows(index, experts), route_rows(index % 3, 3, side=1)
    np.testing.assert_array_equal(regroup(gather(x, old), old, new), gather(x, new))


@pytest.mark.parametrize("form", ["nf4", "int8", "mxfp4"])
def test_an_expert_of_a_layer_is_read_by_reference(form):
    weights = drawn(0, 6, N, K)
    stack = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), jax.vmap(QUANTIZE[form])(weights))
    experts = stack.at_layer(jnp.int32(1))
    assert isinstance(experts, Experts)
    one = expert(experts, jnp.int32(2))
    assert one.stack.leading == (6,) and one.shape == (N, K)
    np.testing.assert_array_equal(one.take().dequantize(), stack[1][2].dequantize())


def layers(stack, x, index, remat: bool = False):
    """Two projections of each layer of a stack `[L, E, …]` of square matrices, in a scan over the layers."""

    def layer(x, i):
        routing, experts = route_rows(index, stack.leading[1]), stack.at_layer(i)
        y = jnp.tanh(expert_matmul(gather(x, routing), experts, routing))
        y = expert_matmul(y, experts, routing)
        return x + combine(y, jnp.full(index.shape, 0.5, y.dtype), routing), None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    return jax.lax.scan(layer, x, jnp.arange(stack.leading[0]))[0].sum()


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_and_its_derivative(remat):
    stack = jax.vmap(jax.vmap(nf4.quantize))(drawn(0, 3, 4, K, K) * 0.2)
    x, index = drawn(1, 9, K), jax.random.randint(jax.random.key(2), (9, 2), 0, 4)

    def definition(x):
        for weight in stack.dequantize():
            y = jnp.tanh(reference.expert_matmul(jnp.broadcast_to(x[:, None], (9, 2, K)), weight, index))
            x = x + 0.5 * reference.expert_matmul(y, weight, index).sum(1)
        return x.sum()

    ours = jax.jit(jax.value_and_grad(lambda x: layers(stack, x, index, remat)))(x)
    for got, want in zip(ours, jax.value_and_grad(definition)(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["nf4", "mxfp4", "int8"])
@pytest.mark.parametrize("pass_", [lambda f: f, jax.grad], ids=["forward", "backward"])
def test_neither_the_stack_nor_a_layer_is_ever_dequantized(form, pass_):
    depth, experts, size, tokens = 3, 48, 256, 64
    plain = jax.ShapeDtypeStruct((depth, experts, size, size), jnp.float32)
    stack = jax.eval_shape(jax.vmap(jax.vmap(QUANTIZE[form])), plain)
    x, index = jax.ShapeDtypeStruct((tokens, size), jnp.float32), jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    run = pass_(lambda x, stack, index: layers(stack, x, index))
    compiled = jax.jit(run).lower(x, stack, index).compile()
    tiles, one_expert = tile_count(2 * tokens, experts, 8) * 8 * size * 4, size * size * 4
    # The backward pass finds three arrays of tiles of every layer. A copy of a layer's codes, 1.6 MB and more, would
    # stand out; its experts in 32 bits are 12.6 MB.
    most = 3 * depth * tiles + 8 * one_expert if pass_ is jax.grad else 2 * tiles + 5 * one_expert
    assert compiled.memory_analysis().temp_size_in_bytes < most
    assert most < 0.6 * experts * one_expert


@pytest.mark.parametrize(("tokens", "call"), [(4096, "nf4_dequantize"), (8, "nf4_matmul")])
def test_on_gpus_the_kernels_read_the_whole_stack(tokens, call):
    """Lowered for a device that is not there: many rows dequantize an expert, few take the fused kernel."""
    stack = packed_shapes((512, 512), "bfloat16", double=True, leading=(2, 16))
    x = jax.ShapeDtypeStruct((tokens, 512), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((tokens, 4), jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    run = jax.jit(jax.grad(lambda x, stack, index: layers(stack, x, index).astype(jnp.float32)))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = run.trace(x, stack, index).lower(lowering_platforms=("cuda",)).as_text()
    assert call in text and "nf4_dequantize" in text
    assert "tensor<32x131072xui8>" in text  # the kernels' codes: those of all layers' experts
