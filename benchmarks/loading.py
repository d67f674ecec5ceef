"""What does load-and-quantize cost beside reading the files alone, in time and in memory?

    JAX_PLATFORMS=cpu python benchmarks/loading.py [--model DIR | --geometry FILE --layers N]

Without `--model` a checkpoint of the geometry, with random bfloat16 weights, is written to a temporary folder first.
Each measurement is a process of its own. Its host peak is how far the process grew beyond what imports, compilers and
the load of a tiny model take; its device peak is the allocator's, which a CPU does not have: there the host's holds
everything. Prints the figures side by side, and writes benchmarks/results/loading.json and the table in docs/memory.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.gpu import load  # noqa: E402
from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.io.hf import load_model  # noqa: E402
from qlora_jax.quant.rules import rules_for  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "loading.json"
PAGE = ROOT / "docs" / "memory.md"
GEOMETRY = ROOT / "configs" / "geometry" / "llama-2-7b.json"
TINY = ROOT / "demo" / "base"


def host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak() -> int | None:
    """Bytes, by the device's allocator; None for a CPU, which has none."""
    stats = jax.local_devices()[0].memory_stats()
    return stats and stats["peak_bytes_in_use"]


def measure(what: str, folder: Path) -> dict:
    """Seconds and peaks of one way through the files, in this process."""
    load.load(TINY)
    baseline = host_peak()
    if what == "read":
        seconds, total = load.read_files(folder)
        return {"seconds": seconds, "bytes": total, "host_peak": host_peak() - baseline}
    seconds = load.load(folder)
    peaks = {"host_peak": host_peak() - baseline, "device_peak": device_peak()}
    stored = load_model(folder, dtype="bfloat16", rules=rules_for("nf4")).model
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(stored)))
    return {"seconds": seconds, **peaks, "stored": size, "device": jax.local_devices()[0].device_kind}


def in_a_process(what: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--measure", what, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(folder: Path, title: str) -> dict:
    """One row of the result: reading, loading for the first time and loading with a warm compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        in_a_process("read", folder)  # the files are in the page cache from here on, for all
        read, first, again = (in_a_process(what, folder) for what in ("read", "load", "load"))
    rates = {name: read["bytes"] / 1e9 / run["seconds"] for name, run in (("first", first), ("again", again))}
    return {
        "model": title,
        "gigabytes": read["bytes"] / 1e9,
        "device": again["device"],
        "read_gb_per_second": read["bytes"] / 1e9 / read["seconds"],
        "first_gb_per_second": rates["first"],
        "load_gb_per_second": rates["again"],
        "stored": again["stored"],
        "read_host_peak": read["host_peak"],
        "host_peak": again["host_peak"],
        "device_peak": again["device_peak"],
    }


def table(row: dict) -> str:
    """The row as Markdown."""

    def gb(count: int | None) -> str:
        return "the host's" if count is None else f"{count / 1e9:.2f} GB"

    read = row["read_gb_per_second"]
    lines = [
        f"| {row['model']}, {row['gigabytes']:.2f} GB, {row['device']} | GB/s | of reading | host peak | device peak |"
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [f"| read the files | {read:.2f} | 1.00 | {gb(row['read_host_peak'])} | - |"]
    rate, first = row["load_gb_per_second"], row["first_gb_per_second"]
    peaks = f"{gb(row['host_peak'])} | {gb(row['device_peak'])}"
    lines += [f"| load and quantize | {rate:.2f} | {rate / read:.2f} | {peaks} |"]
    lines += [f"| the first time, with compiling | {first:.2f} | {first / read:.2f} | - | - |"]
    return "\n".join([*lines, "", f"Stored: {row['stored'] / 1e9:.2f} GB."]) + "\n"


def write(row: dict) -> None:
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    RESULT.write_text(json.dumps({"versions": versions, "rows": [row]}, indent=2) + "\n")
    fill_part(PAGE, "loading-table", table(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model folder")
    parser.add_argument("--geometry", type=Path, default=GEOMETRY, metavar="FILE")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    if options.model:
        print(table(compare(options.model, options.model.name)))
        return
    with tempfile.TemporaryDirectory() as work:
        load.write_checkpoint(Path(work), options.geometry, options.layers)
        row = compare(Path(work), f"{options.geometry.stem} with {options.layers} layers")
    print(table(row))
    write(row)


if __name__ == "__main__":
    main()
