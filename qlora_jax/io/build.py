"""Building a decoder one tensor at a time: each is quantized and written into its stack before the next is read."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.init import key_for
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layers import Frozen
from qlora_jax.models.parameters import STACK, Spec, hf_name, parameter_specs
from qlora_jax.nf4 import NF4Tensor, quantize
from qlora_jax.nf4.tensor import packed_shapes

# Gives a parameter by its Hugging Face name: a host array, or an NF4Tensor where it is stored packed.
Read = Callable[[str, Spec], Any]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which weights are stored in NF4 (the decoder's projections always) and how.

    Attributes:
      double: quantize the block scales a second time.
      lm_head: pack an untied output layer too.
    """

    double: bool = True
    lm_head: bool = False

    def covers(self, path: str, spec: Spec) -> bool:
        """Whether the parameter at `path` is packed."""
        return spec.projection or (self.lm_head and path == "lm_head.weight")


def build_model(
    config: ModelConfig,
    read: Read,
    *,
    dtype: str,
    quantization: Quantization | None,
    kind: type[nnx.Variable] = Frozen,
) -> Decoder:
    """A decoder from whatever `read` returns.

    Args:
      dtype: "bfloat16", "float16" or "float32", for everything that is not packed and for what packed weights give.
      quantization: None leaves every weight as it is read.
      kind: Flax variable type of the weights (see Decoder).
    """
    values = {}
    for path, spec in parameter_specs(config).items():
        packed = quantization is not None and quantization.covers(path, spec)
        convert = functools.partial(_convert, dtype=dtype, quantization=quantization if packed else None)
        layers = config.num_layers if path.startswith(STACK) else None
        values[path] = _stack(map(convert, _reads(read, path, spec, layers)), layers)
    return Decoder(config, values, kind)


def abstract_model(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    quantization: Quantization | None = None,
    kind: type[nnx.Variable] = Frozen,
) -> Decoder:
    """A decoder whose weights are shapes only, for what needs its structure but not its values."""
    values: dict[str, Any] = {}
    for path, spec in parameter_specs(config).items():
        stack = (config.num_layers,) if path.startswith(STACK) else ()
        if quantization is not None and quantization.covers(path, spec):
            values[path] = packed_shapes(spec.shape, dtype, double=quantization.double, stack=stack)
        else:
            values[path] = jax.ShapeDtypeStruct((*stack, *spec.shape), jnp.dtype(dtype))
    return Decoder(config, values, kind)


def random_read(config: ModelConfig, seed: int) -> Read:
    """Random weights instead of a checkpoint's: N(0, initializer_range²), norms one and biases zero, for benchmarks."""

    def read(name: str, spec: Spec) -> jax.Array:
        if len(spec.shape) == 1:
            return jnp.full(spec.shape, 0.0 if name.endswith("bias") else 1.0, jnp.bfloat16)
        return _normal(key_for(jax.random.key(seed), name), spec.shape, config.initializer_range)

    return read


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation)


def _reads(read: Read, path: str, spec: Spec, layers: int | None) -> Iterator[Any]:
    for layer in [None] if layers is None else range(layers):
        yield read(hf_name(path, layer), spec)


def _convert(value: Any, *, dtype: str, quantization: Quantization | None) -> Any:
    if isinstance(value, NF4Tensor):
        return value
    # A host array is cast on the host first: the device never holds a wider copy than it must.
    value = value.astype(dtype) if isinstance(value, np.ndarray) else jnp.asarray(value, dtype)
    return jnp.asarray(value) if quantization is None else quantize(jnp.asarray(value), double=quantization.double)


def _stack(values: Iterator[Any], layers: int | None) -> Any:
    """The only value, or all layers' in one stack that is filled in place."""
    first = next(values)
    if layers is None:
        return first
    stack = _write(_zeros(first, layers), first, 0)
    for layer, value in enumerate(values, start=1):
        if isinstance(value, NF4Tensor) != isinstance(first, NF4Tensor):
            raise NotImplementedError(
                f"layer {layer} stores a weight otherwise than layer 0: all must be packed, or none"
            )
        # One tensor at a time is in flight: without the wait the host would read far ahead of the device.
        stack = jax.block_until_ready(_write(stack, value, layer))
    return stack


def _zeros(value: Any, layers: int) -> Any:
    return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape), a.dtype), value)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Any, value: Any, layer: int) -> Any:
    return jax.tree.map(lambda buffer, a: buffer.at[layer].set(a), stack, value)
