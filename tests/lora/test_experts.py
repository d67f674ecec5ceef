"""LoRA on experts against dense weights with the adapter in them, and PEFT's files of such adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.experts import gather, route_rows
from qlora_jax.kernels.experts.reference import expert_matmul
from qlora_jax.lora.adapter import Shape, Site
from qlora_jax.lora.experts import (
    ExpertAdapterStack,
    ExpertLoRA,
    RowExperts,
    from_peft,
    route_adapters,
    row_update,
    to_peft,
)
from qlora_jax.lora.low_rank import Pair
from qlora_jax.lora.tapped import tap
from qlora_jax.lora.targets import Target

E, N, K, R, T, k = 6, 20, 24, 3, 31, 2
INDEX = jax.random.randint(jax.random.key(9), (T, k), 0, E - 1)  # the last expert has no rows


def drawn(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def pairs(x):
    return jnp.broadcast_to(x[:, None], (len(x), k, x.shape[-1]))


def in_pairs(tiles, routing):
    return tiles.reshape(-1, tiles.shape[-1])[routing.place]


@pytest.mark.parametrize("side", [None, 1])
def test_the_update_and_its_derivatives(side):
    x, A, B = drawn(0, T, K), drawn(1, E, R, K), drawn(2, E, N, R)

    def ours(x, A, B):
        routing = route_rows(INDEX, E, side)
        return in_pairs(ExpertLoRA(A, B, jnp.float32(0.5))(gather(x, routing), routing), routing)

    def dense(x, A, B):
        return expert_matmul(pairs(x), 0.5 * jnp.einsum("ENr,ErK->ENK", B, A), INDEX)

    y, pull = jax.vjp(jax.jit(ours), x, A, B)
    expected, expected_pull = jax.vjp(dense, x, A, B)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(pull(jnp.cos(y)), expected_pull(jnp.cos(y)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_are_summed_in_float32_and_may_be_tapped():
    x, routing = drawn(0, T, K, dtype=jnp.bfloat16), route_rows(INDEX, E)
    own, dy = Pair(drawn(1, E, R, K), drawn(2, E, N, R)), drawn(3, *routing.source.shape, N)

    def loss(pair, x):
        return jnp.vdot(ExpertLoRA(*pair, jnp.float32(0.5))(gather(x, routing), routing), dy.astype(x.dtype))

    exact = jax.grad(loss)(own, x.astype(jnp.float32))
    plain = jax.grad(loss)(own, x)
    taps = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), own)
    tapped = jax.grad(lambda taps: loss(tap(own, taps), x))(taps)
    for want, got, through in zip(exact, plain, tapped, strict=True):
        assert got.dtype == jnp.float32 and through.dtype == jnp.bfloat16
        error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
        assert error < 0.01
        np.testing.assert_array_equal(through, got.astype(jnp.bfloat16))


@pytest.mark.parametrize(("rows", "length", "side"), [(1, 12, 8), (2, 12, 8), (4, 3, 1), (12, 1, 1)])
def test_every_row_of_the_batch_has_its_own_adapter(rows, length, side):
    layers, slots = 2, 3
    stack = ExpertAdapterStack(
        drawn(1, layers, slots, E, R, K), drawn(2, layers, slots, E, N, R), jnp.abs(drawn(3, layers, slots))
    )
    # Nobody has slot 2: what is in it goes nowhere.
    stack = stack._replace(A=stack.A.at[:, 2].set(jnp.nan))
    x, index, own = drawn(0, rows * length, K), INDEX[: rows * length], jnp.arange(rows) % 2

    @jax.jit
    def update(x, index, layer):
        routing = route_rows(index, E)
        adapters = RowExperts(stack, own).at_layer(layer)
        return in_pairs(row_update(gather(x, routing), adapters, route_adapters(index, routing, rows)), routing)

    routing = route_rows(index, E)
    # What is generated has tiles of one row; a single text's tiles serve base and adapters.
    assert route_adapters(index, routing, rows).own.source.shape[1] == side
    assert (route_adapters(index, routing, rows).own is routing) == (rows == 1)
    got = update(x, index, jnp.int32(1))
    for token in range(rows * length):
        slot = int(own[token // length])
        delta = stack.scale[1, slot] * jnp.einsum("ENr,ErK->ENK", stack.B[1, slot], stack.A[1, slot])
        want = expert_matmul(pairs(x[token : token + 1]), delta, index[token : token + 1])
        np.testing.assert_allclose(got[token], want[0], rtol=1e-4, atol=1e-4)


def test_generation_reads_no_more_of_the_adapters_than_its_pairs_need():
    """16 rows of a token each. As many copies of A as there are pairs would be 12 % of the stack's layer."""
    rows, slots, experts, rank, inputs = 16, 9, 32, 16, 256
    stack = ExpertAdapterStack(
        jax.ShapeDtypeStruct((2, slots, experts, rank, inputs), jnp.float32),
        jax.ShapeDtypeStruct((2, slots, experts, inputs, rank), jnp.float32),
        jax.ShapeDtypeStruct((2, slots), jnp.float32),
    )

    def update(x, index, stack, slots, layer):
        routing = route_rows(index, experts)
        own = route_adapters(index, routing, rows)
        return row_update(gather(x, routing), RowExperts(stack, slots, layer), own)

    shapes = jax.ShapeDtypeStruct((rows, inputs), jnp.float32), jax.ShapeDtypeStruct((rows, 2), jnp.int32)
    small = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(update).lower(*shapes, stack, *small).compile()
    own = 2 * rows * rank * inputs * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * own < stack.A.size * 4 / 2


def test_an_untrained_adapter_is_padded_and_drawn_by_name():
    def start(name, target=Target(2, 1.0)):  # noqa: B008
        return ExpertLoRA.start(jax.random.key(0), name, target, Shape(N, K, R, E), Site(lambda: None, jnp.float32))

    A, B = start("experts.gate_up")
    assert A.shape == (E, R, K) and not A[:, 2].any() and not B.any() and B.shape == (E, N, R)
    assert float(jnp.abs(A).max()) <= K**-0.5 < 1.1 * float(jnp.abs(A).max())
    assert len(np.unique(np.asarray(A[:, 0, 0]))) == E  # every expert its own
    assert not np.array_equal(A, start("experts.down").A)
    assert not start("experts.down", None).A.any()


def test_merging():
    weight = np.asarray(drawn(0, E, N, K, dtype=jnp.bfloat16))
    A, B = (np.asarray(drawn(i, *shape)) for i, shape in ((1, (E, R, K)), (2, (E, N, R))))
    for e in range(E):
        want = (weight[e].astype(np.float32) + 0.25 * B[e] @ A[e]).astype(weight.dtype)
        rows = slice(4, 9)  # a checkpoint may keep an expert's rows in several tensors
        for part in (slice(None), rows):
            merged = ExpertLoRA.merge(weight[e][part], Pair(A, B), 0.25, part, e)
            assert merged.dtype == weight.dtype
            np.testing.assert_array_equal(merged, want[part])


def test_files_of_another_model():
    with pytest.raises(ValueError, match=r"lora_A \(6, 8\) and lora_B \(5, 6\) of experts=4: expected"):
        from_peft(Pair(np.zeros((6, 8)), np.zeros((5, 6))), 4)


MODELS = {
    "Qwen3Moe": dict(num_experts=5, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1),
    "GptOss": dict(num_local_experts=5, intermediate_size=24),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_pefts_own_adapters(name, tmp_path):
    """PEFT merges its own files to the same weights, and `to_peft` gives the files' arrays back."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers
    from safetensors.numpy import load_file

    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts_per_tok=2, max_position_embeddings=32, **MODELS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    own = model.model.layers[0].mlp.experts
    names = {"base_layer.": "gate_up_proj", "": "down_proj"}
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(0, 0.1)
    before = {key: getattr(own, key).detach().numpy().copy() for key in names.values()}
    parameters = [f"mlp.experts.{key}" for key in names.values()]
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=parameters, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    merged = adapted.merge_and_unload().model.layers[0].mlp.experts
    # gpt-oss keeps its experts transposed, [E, in, out].
    turned = (lambda a: a.swapaxes(1, 2)) if name == "GptOss" else (lambda a: a)
    for prefix, key in names.items():
        stem = f"base_model.model.model.layers.0.mlp.experts.{prefix}lora_"
        theirs = Pair(held[f"{stem}A.weight"], held[f"{stem}B.weight"])
        pair = from_peft(theirs, 5)
        ours = np.stack([ExpertLoRA.merge(w, pair, 2.0, expert=e) for e, w in enumerate(turned(before[key]))])
        np.testing.assert_allclose(ours, turned(getattr(merged, key).detach().numpy()), rtol=1e-5, atol=1e-6)
        assert np.abs(ours - turned(before[key])).max() > 0.01
        for back, there in zip(to_peft(pair), theirs, strict=True):
            np.testing.assert_array_equal(back, there)
