"""Stacks of which some layers are packed: values, gradients and bytes against the same weights unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, Pieces
from qlora_jax.device.facts import tree_bytes
from qlora_jax.kernels.matmul.mixed import mixed_matmul
from qlora_jax.models import Decoder
from qlora_jax.models.adapters import add_adapters, packed_projection
from qlora_jax.models.table import table
from qlora_jax.quant.mixed import MixedLayer, MixedStack, places_of
from qlora_jax.quant.nf4 import dequantize, quantize
from tests.tiny_config import windowed

PACKED = (True, False, True, False, False)
CONFIG = windowed(0, 0, 0, 0, 0)


def mixed(packed: tuple[bool, ...], shape=(48, 64), seed: int = 0) -> MixedStack:
    random = np.random.default_rng(seed)
    weights = jnp.asarray(random.normal(0, 0.1, (len(packed), *shape)), jnp.float32)
    kept = [i for i, here in enumerate(packed) if not here]
    codes = [quantize(weights[i]) for i, here in enumerate(packed) if here]
    return MixedStack(jax.tree.map(lambda *a: jnp.stack(a), *codes), weights[np.array(kept)], places_of(packed))


def dense(stack: MixedStack) -> jax.Array:
    layers = [stack.layer(i) for i in range(len(stack.places))]
    return jnp.stack([layer if isinstance(layer, jax.Array) else dequantize(layer) for layer in layers])


def test_places():
    assert places_of(PACKED) == (0, -1, 1, -2, -3)
    assert places_of((False, True)) == (-1, 0)


@pytest.mark.parametrize("index", range(5))
def test_a_layer_multiplies_by_its_own_weight(index):
    stack = mixed(PACKED)
    x, dy = (jax.random.normal(jax.random.key(i), (2, 3, size)) for i, size in enumerate((64, 48)))
    y, back = jax.jit(lambda x, i: jax.vjp(lambda x: mixed_matmul(x, MixedLayer(stack, i)), x))(x, index)
    weight = dense(stack)[index]
    np.testing.assert_allclose(y, x @ weight.T, atol=1e-5)
    np.testing.assert_allclose(back(dy)[0], dy @ weight, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoder_of_mixed_stacks_trains_as_with_the_same_weights_unpacked(remat):
    values = {}
    for seed, (path, spec) in enumerate(table(CONFIG).items()):
        stack = spec.leading
        values[path] = 1 + 0.1 * jax.random.normal(jax.random.key(seed), (*stack, *spec.shape))
        if len(spec.shape) == 2:
            values[path] = values[path] - 1
    chosen = {"layers.self_attn.q_proj.weight": PACKED, "layers.mlp.down_proj.weight": PACKED[::-1]}
    for seed, (path, packed) in enumerate(chosen.items()):
        values[path] = mixed(packed, table(CONFIG)[path].shape, seed)
    unpacked = values | {path: dense(values[path]) for path in chosen}

    def loss_and_gradients(values):
        model = Decoder(CONFIG, values)
        add_adapters(model, LoraSection(rank=2, alpha=64.0), jax.random.key(3))
        graphdef, adapters, base = nnx.split(model, nnx.Param, ...)
        adapters = jax.tree.map(lambda a: a + 0.01, adapters)

        def loss(adapters):
            return nnx.merge(graphdef, adapters, base).hidden(jnp.arange(8)[None], pieces=Pieces(remat=remat)).std()

        return jax.jit(jax.value_and_grad(loss))(adapters)

    ours, theirs = loss_and_gradients(values), loss_and_gradients(unpacked)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs[1])) > 1e-3
    assert packed_projection(Decoder(CONFIG, values)).double
    assert packed_projection(Decoder(CONFIG, unpacked)) is None


def test_only_the_layers_that_are_kept_take_their_whole_size():
    stack = mixed((True,) * 9 + (False,), (512, 512))
    one = 512 * 512 * 4
    assert one < tree_bytes(stack) < one + 9 * one / 32 * 4.2


def test_no_stack_is_handed_from_the_forward_to_the_backward_pass():
    """A scan would store what it hands over once for every layer."""
    stack = mixed(PACKED, (64, 64))

    def loss(x):
        return jax.lax.scan(lambda x, i: (mixed_matmul(x, MixedLayer(stack, i)), None), x, jnp.arange(5))[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 64))))
    assert "cond" in text
    for shape in ("f32[5,3,64,64]", "f32[5,64,64]", "u8[5,2,64,32]", "u8[5,64,32]"):
        assert shape not in text
