"""How fast does the serving engine answer: bare base, one adapter, eight adapters in one batch, and swapping them?

    python benchmarks/serving.py [--smoke] [--out FILE]

The engine alone, without HTTP, on NF4 weights with random values: on a GPU the geometry of Llama-2-7B, on a CPU a
small one. What is compared takes turns in one run, and the best of its turns counts: others may use the machine.
Prints a row for each figure and writes them to serving-cpu.json or serving-CARD-DATE.json in benchmarks/results; a
CPU's figures go into docs/serving.md too. Exit code 1 where a bar is missed; a CPU's figures are held to none, and are
seconds of this process's own processor time.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.gpu import fill  # noqa: E402
from benchmarks.gpu.machine import describe, file_name, versions  # noqa: E402
from benchmarks.gpu.results import Bar, Results, make_row  # noqa: E402
from benchmarks.pages import fill_part  # noqa: E402
from benchmarks.random_adapters import write_random_adapter  # noqa: E402
from qlora_jax.config import QuantSection  # noqa: E402
from qlora_jax.io.build import abstract_model  # noqa: E402
from qlora_jax.io.hf import LoadedModel, read_config  # noqa: E402
from qlora_jax.models.config import ModelConfig  # noqa: E402
from qlora_jax.quant.rules import packed  # noqa: E402
from qlora_jax.serve.adapters import AdapterStore  # noqa: E402
from qlora_jax.serve.adapters.reading import Limits, read_checked  # noqa: E402
from qlora_jax.serve.engine import Engine  # noqa: E402
from qlora_jax.serve.request import Event, Finished, Request, Token  # noqa: E402
from qlora_jax.serve.sizes import Base  # noqa: E402
from qlora_jax.serve.sizes import Sizes as EngineSizes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "serving.md"
JOB = "serving"
BATCH, ADAPTERS = 16, 8
MIXED_BAR, ADAPTER_BAR, BATCH_BAR, SWAP_MS = (">=", 0.90), (">=", 0.85), (">=", 8.0), 10.0
PATIENCE = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is: a prompt's tokens, new tokens, a rank, and how often each figure is taken."""

    config: ModelConfig
    dtype: str
    prompt: int
    new: int
    rank: int
    rounds: int
    max_length: int


def small(**changes) -> ModelConfig:
    """A model that a CPU runs in milliseconds."""
    config = read_config(ROOT / "benchmarks" / "gpu" / "smoke.json")
    sizes = dict(hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64)
    return dataclasses.replace(config, **(sizes | dict(vocab_size=4096, windows=(0,) * 8, max_position=512) | changes))


def sizes_for(platform: str, smoke: bool) -> Sizes:
    """The sizes for a platform; `smoke` runs the same code in seconds."""
    if smoke:
        config = read_config(ROOT / "benchmarks" / "gpu" / "smoke.json")
        return Sizes(config=config, dtype="float32", prompt=9, new=20, rank=4, rounds=1, max_length=32)
    if platform == "cpu":
        return Sizes(config=small(), dtype="float32", prompt=16, new=40, rank=16, rounds=4, max_length=64)
    config = read_config(ROOT / "configs" / "geometry" / "llama-2-7b.json")
    return Sizes(config=config, dtype="bfloat16", prompt=512, new=128, rank=16, rounds=5, max_length=1024)


def no_size(sizes: Sizes) -> Sizes:
    """The same with a model so small that a step is nearly the host's work alone."""
    config = dataclasses.replace(read_config(ROOT / "benchmarks" / "gpu" / "smoke.json"), max_position=512)
    return dataclasses.replace(sizes, config=config, dtype="float32", prompt=9, new=200, rank=4, max_length=256)


class Watch:
    """A listener that notes when each token came, by `clock`."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.times: list[float] = []
        self.end: Finished | None = None
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(self.clock())
        elif isinstance(event, Finished):
            self.end = event
            self.done.set()


class Bench:
    """A model with adapters on disk, and the engines that serve it."""

    def __init__(self, sizes: Sizes, folder: Path, clock: Callable[[], float]):
        self.sizes, self.folder, self.clock, self.asked = sizes, folder, clock, 0
        model = abstract_model(sizes.config, dtype=sizes.dtype, rules=packed(QuantSection()))
        graphdef, state = nnx.split(model)
        self.graphdef, self.state = graphdef, fill.random_state(state)
        self.names = [f"a{i}" for i in range(ADAPTERS + 1)]
        loaded = LoadedModel(nnx.merge(graphdef, self.state), "random", None)
        for seed, name in enumerate(self.names):
            write_random_adapter(folder / name, loaded, seed, size=0.02, rank=sizes.rank, targets="all-linear")

    @property
    def limits(self) -> Limits:
        return Limits(
            config=self.sizes.config,
            rank=self.sizes.rank,
            nbytes=1 << 40,
            dtype=self.sizes.dtype,
            base_hash="random",
            quantization=QuantSection(),
        )

    def engine(self, slots: int) -> Engine:
        """A started engine of so many rows."""
        engine = Engine(
            Base(self.graphdef, (self.state,), self.sizes.config, "base", ()),
            AdapterStore(self.folder, self.limits, host=len(self.names)),
            EngineSizes(slots=slots, max_loras=ADAPTERS, max_length=self.sizes.max_length, queue=4 * BATCH),
        )
        engine.start()
        return engine

    def request(self, adapter: str | None) -> Request:
        """With a new prompt."""
        self.asked += 1
        prompt = np.random.default_rng(self.asked).integers(3, self.sizes.config.vocab_size, self.sizes.prompt)
        return Request(prompt=tuple(prompt.tolist()), max_new_tokens=self.sizes.new, adapter=adapter)

    def ask(self, engine: Engine, adapters: Sequence[str | None]) -> tuple[float, float]:
        """(tokens/s while all rows write, seconds until the last one's first token), for a request an adapter.

        Prompts are new every time: none is found in the cache.
        """
        watches, requests = [Watch(self.clock) for _ in adapters], [self.request(adapter) for adapter in adapters]
        began = self.clock()
        # All at once: on a busy machine the first could else have ended before the last has come.
        with engine._lock:
            for request, watch in zip(requests, watches, strict=True):
                engine.submit(request, watch)
        for watch in watches:
            if not watch.done.wait(PATIENCE) or watch.end is None or watch.end.reason != "length":
                raise RuntimeError(f"a request did not end as it should: {watch.end}")
        first, last = max(watch.times[0] for watch in watches), min(watch.times[-1] for watch in watches)
        written = sum(first < moment <= last for watch in watches for moment in watch.times)
        return written / max(last - first, 1e-9), first - began


def measure(bench: Bench, results: Results, platform: str) -> None:
    """All rows."""
    bars = platform != "cpu" and not results.smoke
    add = Rows(results, bars)
    one, base = bench.names[0], None
    mixed = [bench.names[i % ADAPTERS] for i in range(BATCH)]
    batched, single = bench.engine(BATCH), bench.engine(1)
    cases: dict[str, Callable[[], tuple[float, float]]] = {
        "base": lambda: bench.ask(batched, [base] * BATCH),
        "one": lambda: bench.ask(batched, [one] * BATCH),
        "mixed": lambda: bench.ask(batched, mixed),
        "single": lambda: bench.ask(single, [base]),
        "single, adapter": lambda: bench.ask(single, [one]),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(bench.sizes.rounds):
        for name, case in cases.items():
            found[name].append(case())
    speed = {name: max(rate for rate, _ in readings) for name, readings in found.items()}
    first = {name: min(seconds for _, seconds in readings) for name, readings in found.items()}
    add("bare base, batch 1", speed["single"], "tokens/s")
    add(f"bare base, batch {BATCH}", speed["base"], "tokens/s", speed["single"], BATCH_BAR)
    add(f"one adapter, batch {BATCH}", speed["one"], "tokens/s", speed["base"], ADAPTER_BAR)
    add(f"{ADAPTERS} adapters, batch {BATCH}", speed["mixed"], "tokens/s", speed["one"], MIXED_BAR)
    add("first token, bare base", first["single"] * 1e3, "ms")
    add("first token, one adapter", first["single, adapter"] * 1e3, "ms", first["single"] * 1e3, inverse=True)
    single.close()
    swap(bench, batched, add, bars)
    compiled = batched.view().counters["compilations"]
    batched.close()
    add("programs compiled in warm-up", compiled, "programs")


def overhead(bench: Bench, add: "Rows") -> None:
    """A step of a model of no size: what the host does, beside which the device has to find its work."""
    engine = bench.engine(BATCH)
    mixed = [bench.names[i % ADAPTERS] for i in range(BATCH)]
    rates = [bench.ask(engine, mixed)[0] for _ in range(bench.sizes.rounds + 1)]
    engine.close()
    add(f"step of a model of no size, batch {BATCH}", 1e3 * BATCH / max(rates), "ms", note="wall-clock time")


class Rows:
    """Adds rows of this benchmark; bars count where there is a GPU."""

    def __init__(self, results: Results, bars: bool):
        self.results, self.bars = results, bars

    def __call__(self, name: str, value: float, unit: str, reference=None, bar: Bar | None = None, **more) -> None:
        bar = bar if self.bars else None
        self.results.add(make_row(JOB, name, value, unit, reference=reference, bar=bar, **more))


def swap(bench: Bench, engine: Engine, add: Rows, bars: bool) -> None:
    """Reading an adapter from disk, and putting it from host memory into the device's stacks."""
    reading, putting = [], []
    runner = engine._scheduler.runner
    for index in range(2 * bench.sizes.rounds + 1):
        name = bench.names[index % len(bench.names)]
        began = time.perf_counter()
        adapter = read_checked(name, bench.folder / name, bench.limits)
        reading.append(time.perf_counter() - began)
        jax.block_until_ready(runner.stacks)
        began = time.perf_counter()
        runner.install(1 + index % ADAPTERS, adapter.weights)
        jax.block_until_ready(runner.stacks)
        putting.append(time.perf_counter() - began)
    size = adapter.nbytes / 1e6
    note = f"rank {adapter.rank}, all linear layers, {size:.1f} MB"
    milliseconds = min(putting[1:]) * 1e3
    bar = (">=", 1.0) if bars else None
    add("adapter from disk into host memory", min(reading[1:]) * 1e3, "ms", note=note)
    add("adapter from host memory into a slot", milliseconds, "ms", SWAP_MS, bar, inverse=True, note=note)


def others() -> Callable[[], float]:
    """A function that gives the share of the cores that other processes have used since now."""
    began, own, cores = time.perf_counter(), psutil.Process().cpu_times(), psutil.cpu_count()
    before = psutil.cpu_times()

    def share() -> float:
        now, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        used = sum(now) - sum(before) - (now.idle - before.idle) - (now.iowait - before.iowait)
        return max(0.0, (used - (sum(mine[:2]) - sum(own[:2]))) / (time.perf_counter() - began) / cores)

    return share


def table(rows: Sequence[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| | | ratio |", "| --- | --- | --- |"]
    for row in rows:
        against = "" if row["ratio"] is None else f"{row['ratio']:.2f} of {row['reference']:,.1f}"
        if row["unit"] == "ms" and row["ratio"] is not None:
            against = f"{1 / row['ratio']:.2f} of {row['reference']:,.1f}"
        lines.append(f"| {row['name']} | {row['value']:,.2f} {row['unit']} | {against} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the same code in seconds; its figures mean nothing")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(arguments)
    platform, machine, busy = jax.default_backend(), describe(), others()
    name = "serving-cpu.json" if platform == "cpu" else f"serving-{file_name(machine['card'])}"
    results = Results(options.out or RESULTS / name, machine, versions(), smoke=options.smoke)
    results.begin(JOB)
    clock = time.process_time if platform == "cpu" else time.perf_counter
    sizes = sizes_for(platform, options.smoke)
    with tempfile.TemporaryDirectory() as folder:
        measure(Bench(sizes, Path(folder), clock), results, platform)
    with tempfile.TemporaryDirectory() as folder:
        overhead(Bench(no_size(sizes), Path(folder), time.perf_counter), Rows(results, bars=False))
    results.add(make_row(JOB, "share of the cores that other processes used meanwhile", busy(), "of 1"))
    if results.path == RESULTS / "serving-cpu.json":
        fill_part(PAGE, "serving-table", table(results.rows))
    return int(any(row["passed"] is False for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
