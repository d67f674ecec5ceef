"""QLoRA on a CPU: this project beside transformers + PEFT + bitsandbytes.

Command: python benchmarks/peers_cpu.py [--json]      (needs the `test` extra; about 3 minutes on two cores)

Both fine-tune the same random Llama on the same batch with the same settings, each in processes of its own that
take turns: NF4 with double quantization, float32 arithmetic, recomputed activations (the default of both), LoRA of
rank 16 on all linear layers, AdamW, clipping.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from qlora_jax.cli import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cpu-peers.json"
SIZES = dict(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
)
BATCH, LENGTH, RANK, LEARNING_RATE, CLIP = 4, 256, 16, 2e-4, 0.3
SIDES = ("ours", "peers")
PACKAGES = {"ours": ("jax", "flax", "optax"), "peers": ("torch", "transformers", "peft", "bitsandbytes")}
# name, unit, key of a worker's measurement, whether more is better, the bar of the ratio
ROWS = (
    ("train step", "s", "step_s", "reference / value", 3.0),
    ("load and quantize, until ready to train", "s", "load_s", "reference / value", 1.0),
    ("peak resident memory above the process after its imports", "MB", "memory_mb", "value / reference", 1.0),
)
LOSS_TOLERANCE = 1e-4
# Share of the cores that other processes may use meanwhile. Above it the figures mean nothing: torch's threads spin
# while they wait for each other, and sharing their cores made the peers' step 12 times slower, ours twice.
BUSY = 0.1
VERDICTS = {True: "passed", False: "MISSED", None: "not judged"}


def batch():
    """Token ids `[B, T]` of the only batch; every token but the first of a row is scored."""
    import numpy as np

    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (BATCH, LENGTH))


def make_checkpoint(folder: Path) -> None:
    """A bfloat16 Llama with random weights, saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    model.to(torch.bfloat16).save_pretrained(folder)


class Memory:
    """The peak of the process's resident memory since this object was made: every resident page counts, those of
    memory-mapped files and of compilers too.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._before = self._read("VmRSS")

    def peak_mb(self) -> float:
        return (self._read("VmHWM") - self._before) / 1e3

    @staticmethod
    def _read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run_peers(folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """Times transformers + PEFT + bitsandbytes."""
    import bitsandbytes  # noqa: F401
    import peft
    import torch
    import transformers
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama

    torch.set_num_threads(threads)
    memory, began = Memory(), time.perf_counter()
    packed = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packed, dtype=torch.float32, device_map="cpu"
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    load = time.perf_counter() - began
    tokens = torch.from_numpy(batch())

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    count = sum(p.numel() for p in trained)
    return {"load_s": load, "trained": count, **timed(step, steps), "memory_mb": memory.peak_mb()}


def run_ours(folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """Times this project, through what scripts/train.py calls."""
    environment.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import transformers.models.llama.configuration_llama  # noqa: F401  imports torch where it is installed

    from qlora_jax.config import Config, LoraSection, ModelSection, OptimSection, TrainSection
    from qlora_jax.training.setup import make_trainer

    memory, began = Memory(), time.perf_counter()
    config = Config(
        model=ModelSection(path=str(folder), dtype="fp32"),
        lora=LoraSection(rank=RANK, alpha=RANK),
        optim=OptimSection(learning_rate=LEARNING_RATE, warmup_ratio=0.0, clip=CLIP),
        train=TrainSection(steps=steps, batch_size=BATCH, grad_accum=1, seq_len=LENGTH),
    )
    trainer = make_trainer(config, folder, steps)
    jax.block_until_ready(jax.tree.leaves((trainer.parts.trained, trainer.parts.base, trainer.opt_state)))
    load = time.perf_counter() - began
    tokens = batch()[None].astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    named = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions, "scored": positions > 0}
    arrays = jax.tree.map(jnp.asarray, named)
    state = (trainer.parts.trained, trainer.opt_state)

    def step() -> float:
        nonlocal state
        *state, metrics = trainer.train_step(*state, trainer.parts.base, arrays, None)
        jax.block_until_ready(state)
        return metrics["loss"].item()

    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.parts.trained))
    return {"load_s": load, "trained": count, **timed(step, steps), "memory_mb": memory.peak_mb()}


def timed(step, steps: int) -> dict[str, Any]:
    """Seconds of the first step (with its compilation), the median of the others, and the first loss."""
    seconds, losses = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    return {"first_s": seconds[0], "step_s": statistics.median(seconds[1:]), "loss": losses[0]}


def measure(side: str, folder: Path, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process of one side, on the first `threads` cores; adds what share of all cores others used meanwhile."""
    command = [sys.executable, __file__, "--worker", side, "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(options.threads),
    }
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    before = usage()
    finished = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    everyone, own, seconds = (after - start for after, start in zip(usage(), before, strict=True))
    others = (everyone - own) / (seconds * psutil.cpu_count())
    return {**json.loads(finished.stdout.splitlines()[-1]), "busy": others}


def usage() -> tuple[float, float, float]:
    """CPU seconds of all processes, CPU seconds of our finished children, and the time."""
    total, children = psutil.cpu_times(), os.times()
    everyone = sum(total) - total.idle - getattr(total, "iowait", 0.0)
    return everyone, children.children_user + children.children_system, time.perf_counter()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides in turns; the medians of the rounds go into the rows."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        make_checkpoint(folder)
        for number in range(options.rounds):
            for side in SIDES:
                found = measure(side, folder, Path(work) / "cache", options)
                results[side].append(found)
                figures = ", ".join(f"{key} {value:,.5g}" for key, value in found.items())
                print(f"round {number + 1}, {side}: {figures}", file=sys.stderr)
    return {
        "benchmark": "QLoRA on a CPU beside transformers + PEFT + bitsandbytes",
        "machine": machine(options.threads),
        "versions": {name: version(name) for side in SIDES for name in PACKAGES[side]},
        "busy": max(result["busy"] for side in SIDES for result in results[side]),
        "setting": {**SIZES, "batch": BATCH, "length": LENGTH, "rank": RANK, "rounds": options.rounds},
        "rows": rows(results),
    }


def rows(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a figure: ours, the peers' (`reference`), their ratio and the bar it has to meet."""

    def median(side: str, key: str) -> float:
        return statistics.median(result[key] for result in results[side])

    found = []
    for name, unit, key, ratio, bar in ROWS:
        value, reference = median("ours", key), median("peers", key)
        faster = ratio == "reference / value"
        quotient = reference / value if faster else value / reference
        row = {"name": name, "value": value, "unit": unit, "reference": reference, "ratio": quotient}
        passed = quotient >= bar if faster else quotient <= bar
        found.append(row | {"bar": f"{ratio} {'>=' if faster else '<='} {bar:g}", "passed": passed})
    ours, peers = median("ours", "loss"), median("peers", "loss")
    apart = abs(ours - peers) / peers
    found.append(
        {"name": "first loss", "value": ours, "unit": "nats", "reference": peers, "ratio": ours / peers}
        | {"bar": f"apart <= {LOSS_TOLERANCE:g}", "passed": apart <= LOSS_TOLERANCE}
    )
    found += [info(name, key, results) for name, key in (("first step", "first_s"), ("first load", "load_s"))]
    return found


def info(name: str, key: str, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The first process's figure, when nothing is in the compilation cache; it has no bar."""
    value, reference = (results[side][0][key] for side in SIDES)
    row = {"name": f"{name} of the first process, cold cache", "value": value, "unit": "s"}
    return row | {"reference": reference, "ratio": reference / value, "bar": None, "passed": None}


def machine(threads: int) -> dict[str, Any]:
    """The processor, without the machine's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": model, "arch": platform.machine(), "threads": threads, "memory_gb": round(memory)}


def show(report: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'':58} {'ours':>9} {'peers':>9} {'ratio':>7}  bar"]
    for row in report["rows"]:
        verdict = "" if row["bar"] is None else f"{row['bar']}: {VERDICTS[row['passed']]}"
        name, figures = f"{row['name']} [{row['unit']}]", f"{row['value']:9.4g} {row['reference']:9.4g}"
        lines.append(f"{name:58} {figures} {row['ratio']:7.3f}  {verdict}")
    return "\n".join(lines)


def main() -> int:
    """Writes the result file; exit code 1 where a bar is missed, or where others used the machine meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result file's JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a process")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))), help="cores to use")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run = {"ours": run_ours, "peers": run_peers}[options.worker]
        print(json.dumps(run(options.folder, options.steps, options.threads)))
        return 0
    report = compare(options)
    busy = report["busy"] > BUSY
    if busy:
        report["rows"] = [row | {"passed": None} for row in report["rows"]]
    print(json.dumps(report, indent=2) if options.json else show(report))
    if busy:
        print(
            f"error: other processes used {report['busy']:.0%} of the cores, expected at most {BUSY:.0%}: "
            f"no result is written; run this on an idle machine",
            file=sys.stderr,
        )
        return 1
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["passed"] is not False for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
