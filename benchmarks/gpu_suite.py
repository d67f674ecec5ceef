"""What a GPU measures: are the kernels right, how fast are they, the train step and the generation, beside the peers?

    python benchmarks/gpu_suite.py [--part kernels|train|decode|peers|large …] [--out FILE]

Every part takes less than 8 minutes on one card. Rows go to benchmarks/results/CARD-DATE.json after each of them; a
part that is run later joins the same file. docs/benchmarks.md says what is measured, and holds the table that
benchmarks/gpu_table.py makes of the files.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.compare import compared  # noqa: E402
from benchmarks.gpu.context import Context, Refused, reason  # noqa: E402
from benchmarks.gpu.jobs import CHECKS, PARTS, function_of  # noqa: E402
from benchmarks.gpu.machine import describe, file_name, versions  # noqa: E402
from benchmarks.gpu.results import Results, make_row  # noqa: E402
from benchmarks.gpu.sizes import FULL, SMOKE  # noqa: E402

# A worker that overruns its time gets this long to notice by itself before it is ended.
GRACE = 20


def environment(smoke: bool) -> dict[str, str]:
    """A worker's: both frameworks share one card, and the allocator must show what is used, not what was set aside."""
    values = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
    values.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    platforms = values.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        values["JAX_PLATFORMS"] = f"{platforms},cpu"  # the reference is computed on the host
    if not smoke:  # what the compiler says of memory is asked of what it compiled, not of what was stored
        values.pop("JAX_COMPILATION_CACHE_DIR", None)
    else:  # what is timed then means nothing, and compiling is most of it
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        values["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        values["XLA_FLAGS"] = f"{values.get('XLA_FLAGS', '')} {quick}".strip()
    return values


def worker(options: argparse.Namespace) -> int:
    """Runs jobs in this process; one that fails leaves a row that says so. Exit code 1 where one failed."""
    about = json.loads(options.about)
    results = open_results(options, about)
    failed = False
    for job in options.worker.split(","):
        context = Context(results, job, SMOKE if options.smoke else FULL, time.monotonic() + options.seconds)
        results.begin(job)
        try:
            function_of(job)(context)
        except Refused as error:
            context.missing(job, "", str(error))
        except Exception as error:
            failed = True
            context.missing(job, "", f"failed: {reason(error)}")
            sys.excepthook(type(error), error, error.__traceback__)
    return int(failed)


def open_results(options: argparse.Namespace, about: dict) -> Results:
    sizes = SMOKE if options.smoke else FULL
    comparisons = partial(compared, sizes=sizes)
    return Results(options.out, about["machine"], about["versions"], smoke=options.smoke, comparisons=comparisons)


def command(options: argparse.Namespace, *more: str) -> list[str]:
    return [sys.executable, __file__, *more, *(["--smoke"] if options.smoke else [])]


def look(options: argparse.Namespace) -> dict:
    """The machine and the versions, asked in a process of its own: this one never touches the card."""
    found = subprocess.run(
        command(options, "--look"), env=environment(options.smoke), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def run_jobs(options: argparse.Namespace, about: dict, jobs: list[str], seconds: float) -> None:
    """One process for `jobs`. If it is killed, or does not end in time, its jobs without rows get one that says so."""
    arguments = ["--worker", ",".join(jobs), "--out", str(options.out), "--about", json.dumps(about)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command(options, *arguments, "--seconds", f"{seconds:.0f}"),
            env=environment(options.smoke),
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds + GRACE)
            problem = f"ended with code {code}" if code < 0 or code > 1 else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"ended after {seconds:.0f} s, its part's time"
        errors.seek(0)
        text = errors.read()
    if problem or process.returncode:
        print("\n".join(text.splitlines()[-15:]), file=sys.stderr, flush=True)
    if problem:
        report_end(open_results(options, about), jobs, problem)


def report_end(results: Results, jobs: list[str], problem: str) -> None:
    """The rows that a killed process wrote stay; of its jobs, the last that began and those that did not are named."""
    begun = [job for job in jobs if any(row["job"] == job for row in results.rows)]
    for job in begun[-1:] + [job for job in jobs if job not in begun]:
        results.add(make_row(job, job, None, "", note=f"failed: the process {problem}"))


def run_part(options: argparse.Namespace, about: dict, part: str) -> None:
    """The part's jobs one after the other, each in a process of its own, while the part's time lasts."""
    ends = time.monotonic() + 60 * options.minutes
    for job in PARTS[part]:
        left = ends - time.monotonic()
        if left > GRACE:
            run_jobs(options, about, [job], left)
        else:
            results = open_results(options, about)
            results.begin(job)
            results.add(make_row(job, job, None, "", note="not measured: the part's time was up"))


def summary(options: argparse.Namespace, about: dict) -> int:
    """Prints the judged rows; 1 where a bar is missed, something failed or a kernel is wrong."""
    results = open_results(options, about)
    rows = results.rows + results.compared()
    judged = [row for row in rows if row["job"] in CHECKS] if options.smoke else rows
    missed = [row for row in judged if row["passed"] is False]
    failed = [row for row in rows if row.get("note", "").startswith("failed")]
    for row in missed:
        print(f"MISSED {row['name']}: {row['bar']}, ratio {row['ratio']}")
    for row in failed:
        print(f"FAILED {row['name']}: {row['note']}")
    passed = sum(row["passed"] is True for row in rows)
    print(f"{passed} bars met, {len(missed)} missed, {len(failed)} failures: {options.out.name}")
    return int(bool(missed or failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all where not given")
    parser.add_argument("--out", type=Path, help="the result file; benchmarks/results/CARD-DATE.json where not given")
    parser.add_argument("--minutes", type=float, default=6.0, help="time of a part, beside a minute or so of checks")
    for name, kind in (("--worker", str), ("--about", str), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    for name in ("--look", "--smoke"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.look:
        print(json.dumps({"machine": describe(), "versions": versions()}))
        return 0
    if options.worker:
        return worker(options)
    about = look(options)
    card = about["machine"]["card"]
    if card == "cpu" and not options.smoke:
        print("error: JAX sees no GPU here, and this suite measures one: install its CUDA plugin", file=sys.stderr)
        return 2
    options.out = options.out or ROOT / "benchmarks" / "results" / file_name(card)
    run_jobs(options, about, list(CHECKS), 180)
    parts = options.part or list(PARTS)
    if options.smoke:  # there is no memory to keep clean, and importing JAX and torch takes longer than a job
        run_jobs(options, about, [job for part in parts for job in PARTS[part]], 60 * options.minutes)
        return summary(options, about)
    for part in parts:
        run_part(options, about, part)
    return summary(options, about)


if __name__ == "__main__":
    sys.exit(main())
