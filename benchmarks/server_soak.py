"""Ten thousand mixed requests against serve.py: nothing wrong, nothing lost, nothing compiled.

Command: python benchmarks/server_soak.py [--requests N] [--json]     (`test` extra; some minutes on two cores)

A server of the demo's base with twelve random adapters, four places on the device and six in host memory, answers
sixteen clients at once: whole answers, streams, several choices with log probabilities, clients that leave in the
middle, malformed bodies, and meanwhile one adapter's weights are exchanged under its name and another is unloaded and
loaded. Every answer is compared with what generate.py says for that model. It listens on the loopback address only.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_adapters import write_random_adapter  # noqa: E402
from benchmarks.soak.answers import answers_alone  # noqa: E402
from benchmarks.soak.traffic import NEW_TOKENS, Swapped, Traffic, leaks  # noqa: E402
from qlora_jax.cli import environment  # noqa: E402
from qlora_jax.config import QuantSection  # noqa: E402
from qlora_jax.data import load_tokenizer  # noqa: E402
from qlora_jax.io.hf import load_model  # noqa: E402
from qlora_jax.io.peft import WEIGHTS  # noqa: E402
from qlora_jax.quant.rules import rules_for  # noqa: E402

BASE, RESULT = ROOT / "demo" / "base", ROOT / "benchmarks" / "results" / "server-soak.json"
RANKS = (1, 2, 3, 4, 5, 6, 8, 8, 12, 16, 16, 16)
FLAGS = ("--slots", "8", "--max-loras", "4", "--host-adapters", "6", "--max-rank", "16", "--max-length", "128")
PROMPTS, AT_ONCE = 6, 16
PACKAGES = ("jax", "fastapi", "uvicorn")


def main() -> int:
    """Prints what happened; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help=f"also write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    environment.prepare()
    with tempfile.TemporaryDirectory() as work:
        result = soak(Path(work), options.requests)
    print(json.dumps(result, indent=2))
    if options.json:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["failures"] else 0


def soak(work: Path, requests: int) -> dict:
    """Makes adapters, starts the server, sends the traffic, looks at what is left."""
    folder, key = work / "adapters", secrets.token_hex()
    loaded = load_model(BASE, dtype="float32", rules=rules_for("nf4", QuantSection()))
    for number, rank in enumerate(RANKS):
        write_random_adapter(folder / f"adapter-{number}", loaded, number, rank=rank, targets="all-linear")
    write_random_adapter(work / "other", loaded, 100, rank=RANKS[-1], targets="all-linear")
    swapped = Swapped("adapter-11", folder / "adapter-11" / WEIGHTS, (work / "first", work / "other" / WEIGHTS))
    shutil.copyfile(swapped.file, swapped.contents[0])
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 2048, length).tolist() for length in random.integers(2, 60, PROMPTS)]
    models = {f"adapter-{number}": folder / f"adapter-{number}" for number in range(len(RANKS) - 1)}
    contents = {"adapter-11#0": folder / "adapter-11", "adapter-11#1": work / "other"}
    everything, tokenizer = {"base": None, **models, **contents}, load_tokenizer(str(BASE))
    answers = answers_alone(loaded, everything, prompts, tokenizer, new=NEW_TOKENS, rank=max(RANKS))
    distinct = len({tuple(texts) for texts in answers.values()})
    with server(folder, key) as (url, process):
        before = httpx.get(f"{url}/status").json()["engine"]["counters"]["compilations"]
        memory = [process.memory_info().rss]
        traffic = Traffic(url, key, prompts, answers, swapped=swapped, spare="adapter-0", long=50)
        report = asyncio.run(traffic.run(requests, AT_ONCE))
        memory.append(process.memory_info().rss)
        left = leaks(url, before)
        counters = httpx.get(f"{url}/status").json()["engine"]["counters"]
    return {
        "requests": requests,
        "at_once": AT_ONCE,
        "seconds": round(report.seconds, 1),
        "kinds": dict(report.kinds.most_common()),
        "statuses": {str(status): count for status, count in sorted(report.statuses.items())},
        "failures": [*report.failures[:20], *left],
        "different_models": distinct,
        "exchanges": len(swapped.history) - 1,
        "engine": counters,
        "server_memory_mb": [round(size / 1e6) for size in memory],
        "machine": {"arch": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


@contextlib.contextmanager
def server(adapters: Path, key: str) -> Iterator[tuple[str, psutil.Process]]:
    """serve.py on a free port, and its process; ended by SIGTERM, to which it must answer with exit code 0."""
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--model", str(BASE), "--adapters", str(adapters)]
    command += [*FLAGS, "--quant", "nf4", "--dtype", "fp32", "--port", "0"]
    environment = {**os.environ, "QLORA_JAX_ADMIN_KEY": key, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            address = (re.search(r"http://\S+", line) for line in process.stderr)
            found = next((match for match in address if match), None)
            if found is None:
                raise RuntimeError(f"serve.py ended with code {process.wait()} before it listened")
            yield found[0], psutil.Process(process.pid)
            process.terminate()
            if process.wait(60) != 0:
                raise RuntimeError(f"serve.py ended with code {process.returncode} after SIGTERM")
        finally:
            process.kill()


if __name__ == "__main__":
    raise SystemExit(main())
