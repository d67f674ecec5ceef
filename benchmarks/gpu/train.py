"""The whole train step of a 7B model with random weights: speed, share of the matmul peak, and memory."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu import api, fill
from benchmarks.gpu.context import GB, Context, reason
from benchmarks.gpu.flops import forward_flops, train_flops
from benchmarks.gpu.names import FORWARD, LORA, PEAK, QLORA, SMALL, train_name
from benchmarks.gpu.timing import median_seconds, peak_bytes
from qlora_jax.config import Config, LoraSection, ModelSection, Pieces, TrainSection
from qlora_jax.device.facts import device_bytes
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.lora import resolve_targets
from qlora_jax.memory.train_step import abstract_train_step
from qlora_jax.models import linear_modules
from qlora_jax.objective import SFT
from qlora_jax.training.step import make_eval_step

PEAK_BAR, MEMORY_BAR = (">=", 0.60), ("within", 0.05)
LEAST = 60  # seconds that compiling and timing a step may need


def make_config(context: Context, method: str, rank: int, targets) -> Config:
    """The run that is measured: `batch` rows of `seq_len` tokens in one microbatch."""
    sizes = context.sizes
    return Config(
        method=method,
        model=ModelSection(weights="random", geometry=str(sizes.geometry)),
        lora=LoraSection(rank=rank, alpha=16, targets=targets),
        train=TrainSection(
            steps=1000, batch_size=sizes.batch, grad_accum=1, seq_len=sizes.seq_len, loss_chunk=sizes.chunk
        ),
    )


def random_batch(
    geometry, shape: tuple[int, ...], embedded: jax.ShapeDtypeStruct | None = None
) -> dict[str, jax.Array]:
    """Rows of one document each, every token scored; with an embedding in host memory random rows of it."""
    tokens = fill.random_tokens(geometry, shape)
    positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    segments, scored = jnp.ones_like(tokens), jnp.ones(shape, bool)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "scored": scored}
    if embedded is None:
        return batch
    return batch | {"embedded": fill.random_array(jax.random.key(0), embedded.shape, embedded.dtype)}


class Step:
    """A compiled train step with random arrays, and what the compiler says of its memory."""

    def __init__(self, config: Config):
        self.geometry = read_config(Path(config.model.geometry))
        step, (adapters, state, base, batch, _) = abstract_train_step(config)
        self.batch = random_batch(self.geometry, batch["tokens"].shape, batch.get("embedded"))
        began = time.perf_counter()
        self._compiled = step.lower(adapters, state, base, self.batch, None).compile()
        self.compile_seconds = time.perf_counter() - began
        self.predicted = device_bytes(self._compiled)["peak"]
        self._shapes = (adapters, state, base)

    def allocate(self) -> None:
        """Makes the arrays; after this nothing but them is on the device."""
        adapters, state, base = self._shapes
        self.base = fill.random_state(base)
        self.state = (fill.random_state(adapters), fill.zeros(state))
        self._shapes = None

    def __call__(self) -> float:
        """One step, waited for; its loss."""
        *self.state, metrics = self._compiled(*self.state, self.base, self.batch, None)
        return float(metrics["loss"])


def timed_step(context: Context, step: Step) -> tuple[float, float]:
    """Median seconds of a step, and the loss of the first; NaN losses are refused."""
    loss = step()
    if loss != loss:
        raise FloatingPointError("the loss is NaN: the step is wrong, and not timed")
    step()
    return median_seconds(step, context.sizes.steps), loss


def record(context: Context, label: str, tokens: int, seconds: float, flops: float, note: str | None = None) -> None:
    """Speed, and the share of the measured matmul peak."""
    context.row(train_name(label), tokens / seconds, "tokens/s", note=note)
    bar = PEAK_BAR if label == QLORA else None
    peak = context.results.value(PEAK)
    context.row(f"{train_name(label)}: executed FLOPs", flops / seconds / 1e12, "TFLOP/s", reference=peak, bar=bar)


def record_memory(context: Context, name: str, predicted: int) -> None:
    """What the allocator held at most, beside what the compiler predicted."""
    measured = peak_bytes()
    name, reference = f"{name}: peak memory", predicted / GB
    if measured is None:
        context.missing(name, "GB", "not measured: this backend does not count", reference=reference, bar=MEMORY_BAR)
    else:
        context.row(name, measured / GB, "GB", reference=reference, bar=MEMORY_BAR)


def require_exact(context: Context) -> None:
    """Raises Refused unless all that a step computes with packed weights was found right."""
    for operation in ("dequantize", "matmul", "matmul backward"):
        context.require("auto", operation)


def run_step(context: Context, label: str, config: Config) -> None:
    """All rows of one train step."""
    if config.method == "qlora":
        require_exact(context)
    step = Step(config)
    step.allocate()
    seconds, loss = timed_step(context, step)
    sizes = context.sizes
    targets = resolve_targets(config.lora, linear_modules(step.geometry))
    flops = train_flops(step.geometry, targets, sizes.batch, sizes.seq_len, sizes.chunk)
    note = f"loss {loss:.4g}, compiled in {step.compile_seconds:.0f} s"
    record(context, label, sizes.batch * sizes.seq_len, seconds, flops, note)
    record_memory(context, train_name(label), step.predicted)


def run_qlora(context: Context) -> None:
    run_step(context, QLORA, make_config(context, "qlora", 16, "all-linear"))


def run_lora(context: Context) -> None:
    run_step(context, LORA, make_config(context, "lora", 16, "all-linear"))


def run_small(context: Context) -> None:
    run_step(context, SMALL, make_config(context, "qlora", 8, ("q_proj", "v_proj")))


def run_forward(context: Context) -> None:
    """The loss of a batch with bfloat16 weights, no adapters, nothing kept for a backward pass."""
    sizes, geometry = context.sizes, read_config(context.sizes.geometry)
    graphdef, adapters, base = nnx.split(abstract_model(geometry), nnx.Param, ...)
    batch = random_batch(geometry, (sizes.batch, sizes.seq_len))
    step = make_eval_step(graphdef, SFT(), Pieces(loss_chunk=sizes.chunk))
    compiled = step.sums.lower(adapters, base, batch).compile()
    base = fill.random_state(base)
    forward = lambda: jax.block_until_ready(compiled(adapters, base, batch))  # noqa: E731
    forward()
    seconds = median_seconds(forward, sizes.steps)
    flops = forward_flops(geometry, sizes.batch, sizes.seq_len, sizes.chunk)
    record(context, FORWARD, sizes.batch * sizes.seq_len, seconds, flops)
    record_memory(context, train_name(FORWARD), device_bytes(compiled)["peak"])


def run_attention(context: Context) -> None:
    """The main step with each attention that the model offers; speed alone, for the peak is of all these programs."""
    for variant in api.ATTENTION:
        name = train_name(f"{QLORA}, {variant} attention")
        if context.late(name, "tokens/s", LEAST):
            continue
        try:
            run_variant(context, name, variant)
        except Exception as error:  # a variant that this card cannot run must not hide the others
            context.missing(name, "tokens/s", f"not measured: {reason(error)}")


def run_variant(context: Context, name: str, variant: str) -> None:
    """One implementation of attention."""
    require_exact(context)
    with api.attention(variant):
        step = Step(make_config(context, "qlora", 16, "all-linear"))
    step.allocate()
    seconds, loss = timed_step(context, step)
    note = f"loss {loss:.4g}, compiled peak {step.predicted / GB:.2f} GB"
    context.row(name, context.sizes.batch * context.sizes.seq_len / seconds, "tokens/s", note=note)
