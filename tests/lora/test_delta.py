import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import LoRA


def operands(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    A, B = jax.random.normal(keys[0], (4, 24)), jax.random.normal(keys[1], (40, 4))
    return A, B, jax.random.normal(keys[2], (2, 7, 24), dtype), jax.random.normal(keys[3], (2, 7, 40), dtype)


def plain(x, A, B, scale):
    return scale * jnp.einsum("...K,rK,Nr->...N", x, A, B)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_update_and_its_derivatives(dtype):
    A, B, x, dy = operands(dtype)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == jnp.float32 else dict(rtol=0.05, atol=0.5)

    def ours(x, A, B):
        return LoRA(A, B, jnp.float32(0.5))(x)

    y, vjp = jax.vjp(ours, x, A, B)
    expected, plain_vjp = jax.vjp(lambda x, A, B: plain(x, A, B, 0.5).astype(dtype), x, A, B)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), **tolerance)
    for got, want in zip(vjp(dy), plain_vjp(dy), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), **tolerance)


def test_dropout_keeps_the_mean_and_needs_a_key():
    A, B, _, _ = operands()
    x = jnp.ones((20_000, 24))
    layer = LoRA(A, B, jnp.float32(1.0), dropout=0.25)
    np.testing.assert_array_equal(layer(x), LoRA(A, B, jnp.float32(1.0))(x))
    dropped = layer(x, jax.random.key(0))
    assert float(jnp.std(dropped[:, 0])) > 0.1
    np.testing.assert_allclose(dropped.mean(0), layer(x)[0], atol=0.25)
