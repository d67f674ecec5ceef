"""The fused matmul kernel against the reference, in Pallas' interpreter, and its PTX in an emulator."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.dequantize import reference
from qlora_jax.kernels.matmul import decode, dispatch, triton
from qlora_jax.kernels.tiles import MatmulTiles
from qlora_jax.quant.nf4 import CODEBOOKS, NF4Layer
from tests.kernels.test_dequantize import stack


def tiles(tokens: int = 8, blocks: int = 2, programs: int = 8) -> MatmulTiles:
    return MatmulTiles(tokens=tokens, rows=32, blocks=blocks, warps=2, stages=2, programs=programs)


def relative_error(x, layer: NF4Layer, y) -> float:
    exact = x.astype(jnp.float32) @ reference.dequantize(layer, jnp.float32).T
    return float(jnp.abs(y.astype(jnp.float32) - exact).max() / jnp.abs(exact).max())


# N even and odd against the tile; K of one block, an odd number of them, and more parts than blocks.
@pytest.mark.parametrize(("n", "k"), [(64, 128), (70, 448), (33, 64), (96, 1024)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.001)])
def test_kernel_is_the_matmul(n, k, tokens, dtype, tolerance):
    layer = NF4Layer(stack(n, k, dtype="float32"), jnp.int32(1))
    x = jax.random.normal(jax.random.key(1), (tokens, k)).astype(dtype)
    [y] = triton.matmul(x, [layer], tiles(), interpret=True)
    assert y.shape == (tokens, n) and y.dtype == dtype
    assert relative_error(x, layer, y) < tolerance


@pytest.mark.parametrize("double", [True, False])
def test_several_weights_in_one_launch(double):
    layers = [NF4Layer(stack(n, 192, double=double), jnp.int32(i)) for n, i in ((64, 2), (32, 0), (40, 1))]
    x = jax.random.normal(jax.random.key(1), (5, 192)).astype(jnp.bfloat16)
    ys = triton.matmul(x, layers, tiles(), interpret=True)
    for layer, y in zip(layers, ys, strict=True):
        assert y.shape == (5, layer.shape[0])
        assert relative_error(x, layer, y) < 0.01


def test_what_the_kernel_has_no_form_for():
    def fits(*shapes, dtype="bfloat16"):
        return triton.fits([NF4Layer(stack(n, k, layers=1), jnp.int32(0)) for n, k in shapes], dtype, tiles())

    assert fits((64, 128), (32, 128))
    assert not fits((64, 100))  # blocks cross rows
    assert not fits((31, 128))  # fewer rows than a tile
    assert not fits((64, 128), (64, 192))  # two lengths of x
    assert not fits((64, 128), dtype="float32")  # no tensor cores


def test_derivative_of_the_fused_matmul():
    """The sum over the weights of dy · W; the forward pass on this platform is the reference's."""
    layers = [NF4Layer(stack(n, 128, dtype="float32"), jnp.int32(1)) for n in (64, 32)]
    x = jax.random.normal(jax.random.key(1), (2, 3, 128))
    ys, vjp = jax.vjp(lambda x: dispatch._fused(tiles(), x, layers), x)
    dys = [jnp.cos(y) for y in ys]
    expected = sum(dy @ reference.dequantize(layer, jnp.float32) for dy, layer in zip(dys, layers, strict=True))
    np.testing.assert_allclose(vjp(dys)[0], expected, rtol=1e-5, atol=1e-6)


def test_k_is_cut_until_the_card_is_busy():
    assert tiles(programs=64).split(outputs=16, blocks=200, tokens=1) == 4
    assert tiles(programs=64).split(outputs=200, blocks=200, tokens=1) == 1
    assert tiles(programs=64).split(outputs=1, blocks=12, tokens=1) == 3  # two turns a part at least
    assert tiles(programs=64).split(outputs=1, blocks=64, tokens=64) == 4  # or the sums would outweigh the weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ptx_decodes_every_byte_in_every_place(dtype):
    levels = CODEBOOKS["nf4"]
    bits = levels.astype(jnp.dtype(dtype)).view(np.uint16).astype(np.uint32)
    packed = np.random.default_rng(0).integers(0, 256, (4096, 4)).astype(np.uint8)
    for place in range(4):
        packed[256 * place : 256 * (place + 1), place] = np.arange(256)
    constants = decode.registers(levels, dtype).view(np.uint32)
    inputs = {"$4": packed.view("<u4")[:, 0]}
    inputs |= {f"${5 + 4 * i}": np.full(len(packed), c, np.uint32) for i, c in enumerate(constants)}
    registers = run_ptx(decode.ptx(levels, dtype), inputs)
    for place in range(4):
        pair = bits[packed[:, place] >> 4] | (bits[packed[:, place] & 15] << 16)
        np.testing.assert_array_equal(registers[f"${place}"], pair)


def run_ptx(text: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Executes the four instructions that `decode.ptx` uses, on arrays of uint32."""
    registers = dict(registers)
    lanes = len(next(iter(registers.values())))

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.full(lanes, int(word, 0), np.uint32)

    body = re.sub(r"\.reg [^;]*;", "", text.strip("{} "))
    for statement in filter(None, map(str.strip, body.split(";"))):
        name, rest = statement.split(maxsplit=1)
        target, *sources = (word.strip() for word in rest.split(","))
        registers[target] = INSTRUCTIONS[name](*map(value, sources))
    return registers


def permute(a, b, selector):
    """prmt: byte i of the result is that of the eight bytes of b:a which nibble i names; bit 3 is not used here."""
    source = np.stack([(word >> np.uint32(8 * i)) & 0xFF for word in (a, b) for i in range(4)])
    nibbles = [(selector >> np.uint32(4 * i)) & 0xF for i in range(4)]
    assert max(n.max() for n in nibbles) < 8
    picked = [
        np.take_along_axis(source, n[None].astype(int), axis=0)[0] << np.uint32(8 * i) for i, n in enumerate(nibbles)
    ]
    return np.bitwise_or.reduce(picked).astype(np.uint32)


INSTRUCTIONS = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
    "prmt.b32": permute,
}
