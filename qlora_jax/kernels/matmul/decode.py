"""Decoding codes to 16-bit floats in registers, for the fused kernel: inline PTX, and the same in JAX.

A 16-bit level is two bytes, so 16 levels are two tables of 16 bytes. `prmt` picks four bytes out of eight by the low
three bits of four codes: two of them give the candidates of a table's halves, a third picks by the fourth bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt8

# Selects byte i of the first operand, or, with bit 2 of a nibble set, byte i of the second.
IDENTITY, SECOND = 0x32103210, 0x44444444
LOW_BITS = 0x77777777


def byte_tables(levels: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """uint32 `[4]` each: the low and the high bytes of the 16 levels rounded to a 16-bit dtype."""
    bits = np.asarray(levels).astype(jnp.dtype(dtype)).view(np.uint16)
    low, high = (bits & 0xFF).astype(np.uint8), (bits >> 8).astype(np.uint8)
    return low.view("<u4"), high.view("<u4")


def registers(levels: np.ndarray, dtype) -> np.ndarray:
    """int32 `[5]`: the constants that the PTX takes in registers, see `ptx`."""
    low, high = byte_tables(levels, dtype)
    return np.array([low[0], low[2], high[0], high[2], SECOND], np.uint32).view(np.int32)


def ptx(levels: np.ndarray, dtype) -> str:
    """Decodes four packed bytes `$4` to four registers `$0`…`$3`, each a byte's two levels, the first one below.

    `prmt` takes one constant at most, its others must be registers: `$5`, `$9`, …, `$21` (Triton passes each four
    times, once for every byte of the pack).
    """
    low, high = byte_tables(levels, dtype)
    select = f"shr.u32 m, $4, 1; and.b32 m, m, $21; or.b32 m, m, {IDENTITY}; and.b32 t, $4, {LOW_BITS};"
    plane = "prmt.b32 a, {r0}, {c0}, t; prmt.b32 b, {r1}, {c1}, t; prmt.b32 {out}, a, b, m;"
    planes = plane.format(r0="$5", c0=low[1], r1="$9", c1=low[3], out="l")
    planes += plane.format(r0="$13", c0=high[1], r1="$17", c1=high[3], out="h")
    # Nibbles from low to high are: second code of byte 0, first of byte 0, second of byte 1, first of byte 1.
    pairs = "prmt.b32 {0}, l, h, 0x4051; prmt.b32 {1}, l, h, 0x6273;"
    upper = "shr.u32 t, t, 16; shr.u32 m, m, 16;"
    body = select + planes + pairs.format("$0", "$1") + upper + planes + pairs.format("$2", "$3")
    return "{ .reg .b32 t, m, a, b, l, h; " + body + " }"


def divergent(constant: Int[Array, ""]) -> Int[Array, "1 1"]:
    """The same number in a way that ptxas cannot tell to be the same in all lanes.

    It would hold it in a uniform register and copy it back before every `prmt`, which cannot read one.
    """
    never = "{ .reg .b32 a, b; mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_eq; and.b32 a, a, b; or.b32 $0, $1, a; }"
    shape = (1, 1)
    return plt.elementwise_inline_asm(
        never,
        args=[jnp.broadcast_to(constant, shape)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )[0]


def decode(
    codes: UInt8[Array, "rows bytes"], constants: list[Int[Array, "1 1"]], levels: np.ndarray, dtype
) -> Float[Array, "rows 2*bytes"]:
    """Inside a kernel: the levels of packed codes, rounded to a 16-bit dtype."""
    constraints = ",".join(["=r"] * 4 + ["r"] * (1 + 4 * len(constants)))
    pairs = plt.elementwise_inline_asm(
        ptx(levels, dtype),
        args=[codes, *(jnp.broadcast_to(c, codes.shape) for c in constants)],
        constraints=constraints,
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
    )[0]
    halves = (pairs, jax.lax.shift_right_logical(pairs, jnp.int32(16)))
    first, second = (jax.lax.bitcast_convert_type(h.astype(jnp.uint16), jnp.dtype(dtype)) for h in halves)
    return jnp.stack([first, second], axis=-1).reshape(codes.shape[0], -1)


def decode_plain(codes: UInt8[Array, "rows bytes"], levels_ref, dtype) -> Float[Array, "rows 2*bytes"]:
    """`decode` without PTX, for Pallas' interpreter."""
    codes = codes.astype(jnp.int32)
    values = jnp.stack([levels_ref.at[codes >> 4][...], levels_ref.at[codes & 0xF][...]], axis=-1)
    return values.astype(dtype).reshape(codes.shape[0], -1)


def fma(a: Float[Array, "n m"], b: Float[Array, "n 1"], c: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Inside a kernel: a · b + c in one instruction, which Pallas' Triton backend never forms by itself."""
    return plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, jnp.broadcast_to(b, a.shape), c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )[0]
