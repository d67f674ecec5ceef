"""The gated delta rule, its norm and its convolution against transformers' own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.convolution import causal_convolution
from qlora_jax.kernels.delta import gated_delta, gated_norm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_next"])
def theirs(request):
    name = f"transformers.models.{request.param}.modeling_{request.param}"
    return pytest.importorskip(name)


def operands(length):
    """q, k, v, decay, beta and state: 2 key heads of 8, 4 value heads of 12."""
    random = np.random.default_rng(0)
    shapes = (2, length, 2, 8), (2, length, 2, 8), (2, length, 4, 12), (2, length, 4), (2, length, 4), (2, 4, 8, 12)
    q, k, v, decay, beta, state = (random.standard_normal(shape, np.float32) for shape in shapes)
    return q, k, v, -np.exp(decay), 1 / (1 + np.exp(-beta)), state


def by_torch(function, arrays, cotangents):
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    q, k, v, g, beta, state = tensors
    options = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    results = function(q, k, v, g=g, beta=beta, **options)
    gradients = torch.autograd.grad(results, tensors, [torch.tensor(x) for x in cotangents])
    return [x.detach().numpy() for x in (*results, *gradients)]


@pytest.mark.parametrize("length", [5, 70])
def test_the_rule(theirs, length):
    arrays = operands(length)
    q, k, v, decay, beta, state = map(jnp.asarray, arrays)
    starts = jnp.zeros((2, length), jnp.int32)

    @jax.jit
    def ours(q, k, v, decay, beta, state):
        return gated_delta(q, k, v, decay, beta, starts, state)

    results, vjp = jax.vjp(ours, q, k, v, decay, beta, state)
    random = np.random.default_rng(1)
    cotangents = tuple(random.standard_normal(x.shape, np.float32) for x in results)
    actual = [*results, *vjp(tuple(map(jnp.asarray, cotangents)))]
    for function in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        expected = by_torch(function, arrays, cotangents)
        for name, x, y in zip(("y", "after", "q", "k", "v", "decay", "beta", "state"), actual, expected, strict=True):
            tolerance = 2e-6 if name in ("y", "after") else 1e-5
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * abs(y).max(), err_msg=name)


def rounded(x, dtype="bfloat16"):
    """The same array for JAX and for torch."""
    return jnp.asarray(x, dtype), torch.tensor(x).to(getattr(torch, dtype))


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_the_norm_rounds_where_theirs_does(theirs, weights):
    random = np.random.default_rng(0)
    names = [name for name in dir(theirs) if name.endswith("RMSNormGated")]
    norm = getattr(theirs, names[0])(64, eps=1e-6)
    (y, y_torch), (z, z_torch) = (rounded(random.standard_normal((50, 64), np.float32)) for _ in "yz")
    weight, weight_torch = rounded(random.standard_normal(64, np.float32), weights)
    norm.weight.data = weight_torch
    expected = norm(y_torch, z_torch).float().detach().numpy()
    actual = gated_norm(y, z, weight, 1e-6)
    assert actual.dtype == jnp.bfloat16
    # Their rsqrt and exp differ from ours in the last bit, which may round the other way.
    assert np.mean(np.asarray(actual, np.float32) != expected) < 2e-3
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution(theirs, bias):
    random = np.random.default_rng(0)
    shapes = (2, 20, 6), (6, 1, 4), (6,), (2, 3, 6)
    (x, x_torch), (w, w_torch), (b, b_torch), (s, s_torch) = (
        rounded(random.standard_normal(shape, np.float32)) for shape in shapes
    )
    args = w_torch[:, 0], b_torch if bias else None
    expected = theirs.causal_conv1d_fn(x_torch.mT, *args).mT
    b = b if bias else None
    actual, _ = causal_convolution(x, w, b, jnp.zeros((2, 20), jnp.int32))
    np.testing.assert_array_equal(np.asarray(actual, np.float32), expected.float().numpy())

    state_torch = s_torch.mT.contiguous()
    expected = theirs.causal_conv1d_update(x_torch[:, :1].mT, state_torch, *args).mT
    actual, after = causal_convolution(x[:, :1], w, b, jnp.zeros((2, 1), jnp.int32), s)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), expected.float().numpy())
    np.testing.assert_array_equal(np.asarray(after, np.float32), state_torch.mT.float().numpy())
