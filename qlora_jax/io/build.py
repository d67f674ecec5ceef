"""Building a decoder one tensor at a time: each is quantized and written into its stack before the next is read."""

import functools
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.io.packed import Form
from qlora_jax.io.packing import Forms
from qlora_jax.lora.init import key_for
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.params import Param, Tensor
from qlora_jax.models.storing import check_storage, format_of
from qlora_jax.models.table import table
from qlora_jax.quant.formats import PLAIN, Format
from qlora_jax.quant.host_table import HostTable
from qlora_jax.quant.mixed import MixedStack, places_of
from qlora_jax.quant.packed import is_packed
from qlora_jax.quant.rules import AS_HELD, EMBEDDING, Rules

# Gives an array of a parameter: a host array, or packed where a checkpoint holds it so.
Read = Callable[[Tensor], Any]


def build_model(
    config: ModelConfig,
    read: Read,
    *,
    dtype: str,
    rules: Rules = AS_HELD,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
    forms: Forms = MappingProxyType({}),
) -> Decoder:
    """A decoder from whatever `read` returns.

    Args:
      dtype: "bfloat16", "float16" or "float32", for everything that is not packed and for what packed weights give.
      rules: how weights are stored that `read` does not give packed.
      kind: Flax variable type of the weights (see Decoder).
      host_embedding: leaves the embedding in host memory, as a HostTable.
      forms: how the layers of projections are packed, where not all as `rules` say; what `read` gives packed must be
        so here.

    Raises:
      ValueError: a storage that a model of this geometry, or a weight that is read packed, cannot have.
    """
    check_storage(config, rules, host_embedding)
    values: dict[str, Any] = {}
    for path, param in table(config).items():
        if host_embedding and param.module == EMBEDDING:
            values[path] = HostTable(np.array(read(*param.tensors())).astype(dtype, copy=False))
        elif param.stacked:
            values[path] = _stack(param, read, stack_forms(param, dtype, rules, forms), param.dtype or dtype)
        else:
            values[path] = _single(param, read(*param.tensors()), format_of(param, rules), param.dtype or dtype)
    return Decoder(config, values, kind)


def abstract_model(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    rules: Rules = AS_HELD,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
    forms: Forms = MappingProxyType({}),
) -> Decoder:
    """A decoder whose weights are shapes only, for what needs its structure but not its values."""
    check_storage(config, rules, host_embedding)
    values: dict[str, Any] = {}
    for path, param in table(config).items():
        if param.stacked:
            values[path] = _stack_shapes(param, stack_forms(param, dtype, rules, forms), param.dtype or dtype)
        else:
            values[path] = format_of(param, rules).shapes(jax.ShapeDtypeStruct(param.shape, jnp.dtype(dtype)))
    if host_embedding:
        path = f"{EMBEDDING}.weight"
        values[path] = HostTable(values[path])
    return Decoder(config, values, kind)


def random_read(config: ModelConfig, seed: int) -> Read:
    """Random weights instead of a checkpoint's: N(0, initializer_range²), neutral norms, biases 0, for benchmarks."""

    def read(tensor: Tensor) -> jax.Array:
        shape, start = tensor.param.shape, tensor.param.start
        if start is not None:
            return jnp.full(shape, start, jnp.bfloat16)
        name = ".".join(map(str, (tensor.name, *tensor.place[1:])))
        return _normal(key_for(jax.random.key(seed), name), shape, config.initializer_range)

    return read


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation)


def stack_forms(param: Param, dtype: str, rules: Rules, forms: Forms) -> tuple[Form | None, ...]:
    """How every array of a stack is packed; None where it is not."""
    form = format_of(param, rules)
    usual = None if form == PLAIN else Form(form, dtype)
    return forms.get(param.path, tuple(usual for _ in param.tensors()))


def _single(param: Param, value: Any, form: Format, dtype: str) -> Any:
    """A weight outside the layers as it is stored."""
    if is_packed(value):
        if form.name not in ("none", "nf4"):
            raise ValueError(
                f"{param.path} is stored in NF4 already, {form.name} was asked for: leave it, or give original weights"
            )
        return value
    return form.quantize(_cast(value, dtype))


def _cast(value: Any, dtype: str) -> jax.Array:
    # A host array is cast on the host first: the device never holds a wider copy than it must.
    return jnp.asarray(value.astype(dtype) if isinstance(value, np.ndarray) else jnp.asarray(value, dtype))


def _stack(param: Param, read: Read, forms: tuple[Form | None, ...], dtype: str) -> Any:
    """All arrays of a parameter in one stack that is filled in place; a MixedStack where only some are packed."""
    packed, pairs = tuple(form is not None for form in forms), list(zip(param.tensors(), forms, strict=True))
    if all(packed) or not any(packed):
        return _filled(param.leading, (_stored(read, *pair, dtype) for pair in pairs))
    found: list[Any] = []
    for kind in (True, False):
        own = [pair for pair in pairs if (pair[1] is not None) == kind]
        found.append(_filled((len(own),), (_stored(read, *pair, dtype) for pair in own)))
    return MixedStack(found[0], found[1], places_of(packed))


def _stored(read: Read, tensor: Tensor, form: Form | None, dtype: str) -> Any:
    """One array as it is stored."""
    value = read(tensor)
    if is_packed(value):
        return value
    value = _cast(value, form.dtype if form else dtype)
    return form.format.quantize(value) if form else value


def _filled(leading: tuple[int, ...], values: Iterable[Any]) -> Any:
    """A stack `[*leading, …]` of the values, in their order."""
    stack: Any = None
    for place, value in zip(np.ndindex(leading), values, strict=True):
        if stack is None:
            stack = jax.tree.map(lambda a: jnp.zeros((*leading, *a.shape), a.dtype), value)
        # One tensor at a time is in flight: without the wait the host would read far ahead of the device.
        stack = jax.block_until_ready(_write(stack, value, place))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Any, value: Any, place: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda buffer, a: buffer.at[place].set(a), stack, value)


def _stack_shapes(param: Param, forms: tuple[Form | None, ...], dtype: str) -> Any:
    """The stack as shapes."""
    packed, used = tuple(form is not None for form in forms), [form for form in forms if form]
    if not used:
        return jax.ShapeDtypeStruct((*param.leading, *param.shape), jnp.dtype(dtype))
    leading = param.leading if all(packed) else (len(used),)
    codes = used[0].format.shapes(jax.ShapeDtypeStruct((*leading, *param.shape), jnp.dtype(used[0].dtype)))
    plain = jax.ShapeDtypeStruct((len(forms) - len(used), *param.shape), jnp.dtype(dtype))
    return codes if all(packed) else MixedStack(codes, plain, places_of(packed))
