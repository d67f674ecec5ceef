"""The formats that a weight can be stored in, by name: the registry."""

import abc
import dataclasses
from typing import Any

import jax

from qlora_jax.quant import int8, mxfp4, nf4
from qlora_jax.quant.int8.tensor import int8_shapes
from qlora_jax.quant.mxfp4.tensor import mxfp4_shapes
from qlora_jax.quant.nf4.layout import check_rows
from qlora_jax.quant.nf4.tensor import packed_shapes


class Format(abc.ABC):
    """One way to store a weight `[N, K]`, or a stack of them."""

    name: str

    @abc.abstractmethod
    def quantize(self, weight: jax.Array) -> Any:
        """One matrix, as it is stored."""

    @abc.abstractmethod
    def shapes(self, plain: jax.ShapeDtypeStruct) -> Any:
        """What storing a weight or a stack `[*L, N, K]` of this shape and dtype gives, as shapes."""

    def check_table(self, shape: tuple[int, ...], what: str) -> None:
        """Refuses a table of which rows cannot be read one by one. Raises ValueError that begins with `what`."""
        return


@dataclasses.dataclass(frozen=True)
class Plain(Format):
    """As it is, in 16 or 32 bits."""

    name = "none"

    def quantize(self, weight: jax.Array) -> jax.Array:
        return weight

    def shapes(self, plain: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return plain


@dataclasses.dataclass(frozen=True)
class NF4(Format):
    """In 4 bits; `double`: the block scales are quantized a second time."""

    double: bool = True
    name = "nf4"

    def quantize(self, weight: jax.Array) -> nf4.NF4Tensor:
        return nf4.quantize(weight, double=self.double)

    def shapes(self, plain: jax.ShapeDtypeStruct) -> nf4.NF4Tensor:
        return packed_shapes(plain.shape[-2:], plain.dtype, double=self.double, leading=plain.shape[:-2])

    def check_table(self, shape: tuple[int, ...], what: str) -> None:
        check_rows(shape, what)


@dataclasses.dataclass(frozen=True)
class Int8(Format):
    """In 8 bits, with a scale for each row."""

    name = "int8"

    def quantize(self, weight: jax.Array) -> int8.Int8Tensor:
        return int8.quantize(weight)

    def shapes(self, plain: jax.ShapeDtypeStruct) -> int8.Int8Tensor:
        return int8_shapes(plain.shape, plain.dtype)


@dataclasses.dataclass(frozen=True)
class MXFP4(Format):
    """In 4-bit floats, with a power of two for each block of 32."""

    name = "mxfp4"

    def quantize(self, weight: jax.Array) -> mxfp4.MXFP4Tensor:
        return mxfp4.quantize(weight)

    def shapes(self, plain: jax.ShapeDtypeStruct) -> mxfp4.MXFP4Tensor:
        return mxfp4_shapes(plain.shape, plain.dtype)


PLAIN = Plain()
# By the names that configurations, command lines and adapters' records have.
FORMATS: dict[str, Format] = {one.name: one for one in (PLAIN, NF4(), Int8(), MXFP4())}
