"""The same work by bitsandbytes, and by transformers + PEFT + bitsandbytes, on the same card in the same run.

torch, and what builds on it, is imported inside the functions: a peer that is not installed gives rows that say so.
"""

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np

from benchmarks.gpu.context import GB, Context, reason
from benchmarks.gpu.names import peer_decode_name, peer_dequantize_name, peer_gemv_name, peer_train_name
from benchmarks.gpu.sizes import Sizes

RANK, LEARNING_RATE, CLIP, REPEATS = 16, 2e-4, 0.3, 2
LEAST = 40


def imported(context: Context, names: list[tuple[str, str]], *modules: str) -> list[ModuleType] | None:
    """The modules; None, and rows that say why, where one cannot be imported or has no device to run on."""
    try:
        found = [importlib.import_module(module) for module in modules]
        note = None if context.sizes.smoke or found[0].cuda.is_available() else "torch sees no GPU"
    except Exception as error:  # a broken installation raises more than ImportError
        note = f"cannot be imported: {reason(error)}"
    for name, unit in names if note else []:
        context.missing(name, unit, f"not measured: {note}")
    return None if note else found


def device(sizes: Sizes) -> str:
    return "cpu" if sizes.smoke else "cuda"


def timed(torch, function: Callable, sets: list, sizes: Sizes) -> float:
    """Median device seconds of a call, over the sets in turn: between CUDA events, in a graph where that works."""
    for arguments in [*sets, *sets]:
        function(*arguments)
    if sizes.smoke:
        began = time.perf_counter()
        function(*sets[0])
        return time.perf_counter() - began
    replay = captured(torch, function, sets)
    readings = []
    for _ in range(sizes.rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        readings.append(start.elapsed_time(end) / 1e3 / len(sets))
    return statistics.median(readings)


def captured(torch, function: Callable, sets: list) -> Callable[[], None]:
    """All sets once, as a CUDA graph: the peer is not charged for Python's launches. Plain calls if it has none."""

    def plain():
        for arguments in sets:
            function(*arguments)

    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return plain


def packed_sets(torch, functional, shape: tuple[int, int], extra: int, sizes: Sizes) -> list:
    """(codes, state) of random weights that go through more memory than a cache holds."""
    count = math.ceil(sizes.rotate_bytes / (math.prod(shape) // 2 + extra))

    def one():
        weight = torch.randn(shape, dtype=torch.bfloat16, device=device(sizes)) * 0.02
        return functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    return [one() for _ in range(count)]


def run_kernels(context: Context) -> None:
    """dequantize_4bit in GB/s and gemv_4bit in microseconds, for the shapes of our kernels."""
    sizes = context.sizes
    names = [(peer_dequantize_name(s), "GB/s") for s in (*sizes.shapes, sizes.merged)]
    names += [(peer_gemv_name(shape), "us") for shape in sizes.shapes]
    modules = imported(context, names, "torch", "bitsandbytes.functional")
    if modules is None:
        return
    torch, functional = modules
    for shape in (*sizes.shapes, sizes.merged):
        dequantize_row(context, torch, functional, shape)
    for shape in sizes.shapes:
        gemv_row(context, torch, functional, shape)


def dequantize_row(context: Context, torch, functional, shape: tuple[int, int]) -> None:
    """Bytes are counted as for our kernel: half a byte and 1/64 byte of scale read, two written, an element."""
    written = 2 * math.prod(shape)
    sets = packed_sets(torch, functional, shape, written, context.sizes)
    seconds = timed(torch, functional.dequantize_4bit, sets, context.sizes)
    moved = written + math.prod(shape) // 2 + math.prod(shape) // 64 + 4 * math.ceil(math.prod(shape) / 64 / 256)
    context.row(peer_dequantize_name(shape), moved / seconds / GB, "GB/s")


def gemv_row(context: Context, torch, functional, shape: tuple[int, int]) -> None:
    x = torch.randn((1, 1, shape[1]), dtype=torch.bfloat16, device=device(context.sizes))
    sets = packed_sets(torch, functional, shape, 0, context.sizes)
    gemv = lambda codes, state: functional.gemv_4bit(x, codes.t(), state=state)  # noqa: E731
    with torch.no_grad():
        seconds = timed(torch, gemv, sets, context.sizes)
    context.row(peer_gemv_name(shape), seconds * 1e6, "us")


def run_train(context: Context, variant: str) -> None:
    """One way of training: PEFT's recipe (float32 beside the packed weights, autocast), or bfloat16 throughout."""
    name, attention = peer_train_name(variant), variant.split(", ")[1]
    modules = imported(context, [(name, "tokens/s")], "torch", "transformers", "peft", "bitsandbytes")
    if modules is None:
        return
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        context.missing(name, "tokens/s", "not measured: flash_attn is not installed")
        return
    from benchmarks.gpu import peer_model

    torch, on, sizes = modules[0], device(context.sizes), context.sizes
    model = peer_model.packed_model(sizes.geometry, on, attention)
    model = peer_model.adapted(model, RANK, upcast=variant.startswith("recipe"))
    seconds, loss = step_seconds(torch, model, sizes, on)
    tokens = sizes.batch * sizes.seq_len
    context.row(name, tokens / seconds, "tokens/s", note=f"loss {loss:.4g}")
    peak = peer_model.peak_bytes(on)
    if peak is None:
        context.missing(f"{name}: peak memory", "GB", "not measured: this backend does not count")
    else:
        context.row(f"{name}: peak memory", peak / GB, "GB")


def step_seconds(torch, model, sizes: Sizes, on: str) -> tuple[float, float]:
    """Median seconds of forward, backward, clipping and AdamW, waited for; and the first loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=on == "cuda")
    vocabulary = model.config.vocab_size
    drawn = np.random.default_rng(0).integers(0, vocabulary, (sizes.batch, sizes.seq_len))
    tokens = torch.from_numpy(drawn).to(on)

    def step() -> float:
        with torch.autocast(on, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    first, readings = step(), []
    step()
    for _ in range(sizes.steps):
        began = time.perf_counter()
        step()
        if on == "cuda":
            torch.cuda.synchronize()
        readings.append(time.perf_counter() - began)
    return statistics.median(readings), first


def run_decode(context: Context) -> None:
    """Greedy generation with transformers' own loop and cache."""
    names = [(peer_decode_name(batch), "tokens/s") for batch in context.sizes.batches]
    modules = imported(context, names, "torch", "transformers", "bitsandbytes", "peft")
    if modules is None:
        return
    from benchmarks.gpu import peer_model

    model = peer_model.packed_model(context.sizes.geometry, device(context.sizes), "sdpa").eval()
    for batch in context.sizes.batches:
        if context.late(peer_decode_name(batch), "tokens/s", LEAST):
            continue
        try:
            decode_row(context, modules[0], model, batch)
        except Exception as error:  # a batch that does not fit must not hide the smaller ones
            context.missing(peer_decode_name(batch), "tokens/s", f"failed: {reason(error)}")


def decode_row(context: Context, torch, model, batch: int) -> None:
    """As in decode.py: what all new tokens take beyond the time of the first one."""
    sizes, on = context.sizes, device(context.sizes)
    drawn = np.random.default_rng(batch).integers(3, model.config.vocab_size, (batch, sizes.prompt))
    prompt = torch.from_numpy(drawn).to(on)

    def seconds(new: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        assert out[0, -1].item() >= 0  # waits for the device
        assert out.shape[1] == sizes.prompt + new
        return time.perf_counter() - began

    seconds(2)
    first = statistics.median(seconds(1) for _ in range(REPEATS))
    whole = statistics.median(seconds(sizes.new_tokens) for _ in range(REPEATS))
    rate = batch * (sizes.new_tokens - 1) / (whole - first)
    context.row(peer_decode_name(batch), rate, "tokens/s", note=f"first token after {first * 1e3:.3g} ms")


def run_unsloth(context: Context) -> None:
    """Unsloth loads checkpoints only, from folders it knows; the row says what it would need."""
    names = [("train step, Unsloth", "tokens/s")]
    if imported(context, names, "torch", "unsloth"):
        note = "not measured: it trains from a checkpoint folder, and this suite's models have only a geometry"
        context.missing(*names[0], note)
