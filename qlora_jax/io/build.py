"""Building a decoder one tensor at a time: each is quantized and written into its stack before the next is read."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.io.packing import Form, Forms
from qlora_jax.lora.init import key_for
from qlora_jax.models.blocks.layers import Frozen
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import STACK, Spec, hf_name, parameter_specs
from qlora_jax.quant import int8, nf4
from qlora_jax.quant.host_table import HostTable
from qlora_jax.quant.int8.tensor import int8_shapes
from qlora_jax.quant.mixed import MixedStack, places_of
from qlora_jax.quant.nf4 import NF4Tensor
from qlora_jax.quant.nf4.rows import check_rows
from qlora_jax.quant.nf4.tensor import packed_shapes
from qlora_jax.quant.storage import STORAGES

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

# Gives a parameter by its Hugging Face name: a host array, or an NF4Tensor where it is stored packed.
Read = Callable[[str, Spec], Any]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are stored: the decoder's projections in NF4, two others as one of STORAGES says.

    Attributes:
      double: quantize NF4's block scales a second time.
      lm_head: the untied output layer.
      embedding: the token embedding, which is the output layer too where the two are tied.
    """

    double: bool = True
    lm_head: str = "none"
    embedding: str = "none"

    def __post_init__(self):
        for name in ("lm_head", "embedding"):
            if getattr(self, name) not in STORAGES:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(STORAGES)}")

    def storage(self, path: str, spec: Spec) -> str:
        """How the parameter at `path` is stored, one of STORAGES."""
        others = {HEAD: self.lm_head, EMBEDDING: self.embedding}
        return "nf4" if spec.projection else others.get(path, "none")

    def check_shapes(self, config: ModelConfig) -> None:
        """Refuses tables of this geometry that cannot be packed. Raises ValueError."""
        for path, name in ((EMBEDDING, "embedding"), (HEAD, "lm_head")):
            spec = parameter_specs(config).get(path)
            if spec and self.storage(path, spec) == "nf4":
                check_rows(spec.shape, f"quant.{name}")

    def apply(self, path: str, spec: Spec, value: jax.Array) -> Any:
        """A parameter's value as it is stored."""
        storage = self.storage(path, spec)
        if storage == "none":
            return value
        return nf4.quantize(value, double=self.double) if storage == "nf4" else int8.quantize(value)

    def shapes(self, path: str, spec: Spec, plain: jax.ShapeDtypeStruct) -> Any:
        """What storing a weight, or a stack of them, of this shape and dtype gives, as shapes."""
        storage = self.storage(path, spec)
        if storage == "nf4":
            stack = plain.shape[: -len(spec.shape)]
            return packed_shapes(spec.shape, plain.dtype, double=self.double, stack=stack)
        return int8_shapes(plain.shape, plain.dtype) if storage == "int8" else plain


def check_storage(config: ModelConfig, quantization: Quantization | None, host_embedding: bool) -> None:
    """Refuses what a model of this geometry cannot have. Raises ValueError."""
    if config.tie_embeddings:
        _check_tied(config, quantization or Quantization(), host_embedding)
    if quantization is not None:
        quantization.check_shapes(config)


def _check_tied(config: ModelConfig, quantization: Quantization, host_embedding: bool) -> None:
    """Refuses storing one table in two ways, with all that is to be changed."""
    head, table = quantization.lm_head, quantization.embedding
    asked, changes = [], []
    if host_embedding:
        asked.append("model.embedding='host'")
        changes.append("model.embedding='device'")
    if head not in ("none", table):
        asked.append(f"quant.lm_head={head!r}")
        changes.append(f"quant.embedding={head!r} (now {table!r})")
    if asked:
        raise ValueError(
            f"{' and '.join(asked)}: this {config.family} model's output layer is its embedding, stored once, on the "
            f"device: set {' and '.join(changes)}"
        )


def build_model(
    config: ModelConfig,
    read: Read,
    *,
    dtype: str,
    quantization: Quantization | None,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
    forms: Forms = MappingProxyType({}),
) -> Decoder:
    """A decoder from whatever `read` returns.

    Args:
      dtype: "bfloat16", "float16" or "float32", for everything that is not packed and for what packed weights give.
      quantization: None leaves every weight as it is read.
      kind: Flax variable type of the weights (see Decoder).
      host_embedding: leaves the embedding in host memory, as a HostTable.
      forms: how the layers of projections are packed, where not all as `quantization` says; what `read` gives packed
        must be so here.

    Raises:
      ValueError: a storage that a model of this geometry, or a weight that is read packed, cannot have.
    """
    check_storage(config, quantization, host_embedding)
    values: dict[str, Any] = {}
    for path, spec in parameter_specs(config).items():
        if host_embedding and path == EMBEDDING:
            values[path] = HostTable(np.array(read(hf_name(path, None), spec)).astype(dtype, copy=False))
        elif path.startswith(STACK):
            layers = layer_forms(config, path, spec, dtype=dtype, quantization=quantization, forms=forms)
            weights = (_layer(read(hf_name(path, i), spec), form, dtype) for i, form in enumerate(layers))
            values[path] = _stack(weights, tuple(form is not None for form in layers))
        else:
            values[path] = _table(read(hf_name(path), spec), path, spec, dtype, quantization)
    return Decoder(config, values, kind)


def abstract_model(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    quantization: Quantization | None = None,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
    forms: Forms = MappingProxyType({}),
) -> Decoder:
    """A decoder whose weights are shapes only, for what needs its structure but not its values."""
    check_storage(config, quantization, host_embedding)
    values: dict[str, Any] = {}
    for path, spec in parameter_specs(config).items():
        if path.startswith(STACK):
            layers = layer_forms(config, path, spec, dtype=dtype, quantization=quantization, forms=forms)
            values[path] = _stack_shapes(spec, layers, dtype)
        else:
            plain = jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype))
            values[path] = plain if quantization is None else quantization.shapes(path, spec, plain)
    if host_embedding:
        values[EMBEDDING] = HostTable(values[EMBEDDING])
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


def layer_forms(
    config: ModelConfig, path: str, spec: Spec, *, dtype: str, quantization: Quantization | None, forms: Forms
) -> tuple[Form | None, ...]:
    """How every layer of a stack is packed; None where it is not."""
    usual = Form(quantization.double, dtype) if quantization and spec.projection else None
    return forms.get(path, (usual,) * config.num_layers)


def _layer(value: Any, form: Form | None, dtype: str) -> Any:
    """One layer's weight as it is stored."""
    if isinstance(value, NF4Tensor):
        return value
    value = _cast(value, form.dtype if form else dtype)
    return nf4.quantize(value, double=form.double) if form else value


def _table(value: Any, path: str, spec: Spec, dtype: str, quantization: Quantization | None) -> Any:
    """A weight outside the layers as it is stored."""
    if isinstance(value, NF4Tensor):
        if quantization is not None and quantization.storage(path, spec) == "int8":
            raise ValueError(f"{path} is stored in NF4 already, int8 was asked for: leave it, or give original weights")
        return value
    value = _cast(value, dtype)
    return value if quantization is None else quantization.apply(path, spec, value)


def _cast(value: Any, dtype: str) -> jax.Array:
    # A host array is cast on the host first: the device never holds a wider copy than it must.
    return jnp.asarray(value.astype(dtype) if isinstance(value, np.ndarray) else jnp.asarray(value, dtype))


def _stack(values: Iterator[Any], packed: tuple[bool, ...]) -> Any:
    """All layers' weights in one stack that is filled in place; a MixedStack where only some are packed."""
    stacks: dict[bool, Any] = {}
    places = places_of(packed)
    for value, kind, place in zip(values, packed, places, strict=True):
        if kind not in stacks:
            stacks[kind] = _zeros(value, packed.count(kind))
        # One tensor at a time is in flight: without the wait the host would read far ahead of the device.
        stacks[kind] = jax.block_until_ready(_write(stacks[kind], value, place if kind else -1 - place))
    return MixedStack(stacks[True], stacks[False], places) if len(stacks) == 2 else stacks.popitem()[1]


def _stack_shapes(spec: Spec, layers: tuple[Form | None, ...], dtype: str) -> Any:
    """The stack as shapes."""
    packed, forms = tuple(form is not None for form in layers), [form for form in layers if form]
    plain = jax.ShapeDtypeStruct((len(layers) - len(forms), *spec.shape), jnp.dtype(dtype))
    if not forms:
        return plain
    codes = packed_shapes(spec.shape, forms[0].dtype, double=forms[0].double, stack=(len(forms),))
    return codes if all(packed) else MixedStack(codes, plain, places_of(packed))


def _zeros(value: Any, layers: int) -> Any:
    return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape), a.dtype), value)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Any, value: Any, layer: int) -> Any:
    return jax.tree.map(lambda buffer, a: buffer.at[layer].set(a), stack, value)
