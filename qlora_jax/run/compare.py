"""One comparison from its configuration to its report."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from qlora_jax.compare.memory import GPU, memory_in_a_process
from qlora_jax.compare.results import comparison
from qlora_jax.compare.study import Stopped, Study, check_files, check_study, outcomes, start_study
from qlora_jax.config import Config
from qlora_jax.report.comparison import write_comparison
from qlora_jax.report.comparison_table import print_tables
from qlora_jax.report.run import versions
from qlora_jax.run.train import train

RESULT = "compare.json"


def compare(config: Config, out: Path, mode: str) -> int:
    """Runs (or continues) the comparison in `out`; returns the exit code.

    Everything that can be wrong with the input is checked before the folder is written.
    """
    study = Study(config, out, mode)
    check_study(study)
    runs = Study(check_files(config), out, mode)
    start_study(study)
    try:
        found = list(outcomes(runs, train, say))
    except Stopped as stop:
        say(str(stop))
        return stop.code
    result = comparison(study, found, memory(study), about())
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    page = write_comparison(out, result)
    print_tables(result, sys.stdout)
    say(f"done: {out / RESULT}, {page}")
    return 0


def memory(study: Study) -> dict[str, Any]:
    """The 7B rows; compiled but where time is short. Kept in the folder, because compiling takes a minute."""
    file = study.out / "memory.json"
    if not file.exists():
        say("planning the memory of a 7B model …")
        found = memory_in_a_process(None if study.mode == "quick" else GPU)
        if found["not_compiled"] and study.mode != "quick":
            say(f"by arithmetic, not compiled: {found['not_compiled']}")
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def about() -> dict[str, Any]:
    """Machine and versions."""
    device = jax.local_devices()[0]
    machine = {"device": device.device_kind, "platform": device.platform}
    return {"machine": machine | {"cpu": processor(), "arch": platform.machine()}, "versions": dict(versions())}


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
