"""How little memory does it take? Compiled peaks of chosen train steps, each with the fields it sets and its target.

    pip install -e '.[plan]'; JAX_PLATFORMS=cpu python benchmarks/memory_targets.py [--row N …]

Compiles the rows of benchmarks/memory_rows.py for their cards, without a GPU, and prints them. They are written to
benchmarks/results/memory-targets.json, where they take the place of older figures, and to docs/memory.md. A test
compiles every row with few layers and holds it to that file. Exit code 1 where a row misses its target.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.memory_rows import ROWS, Row  # noqa: E402
from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.config import Config, load_config  # noqa: E402
from qlora_jax.device.facts import device_bytes  # noqa: E402
from qlora_jax.io.hf import read_config  # noqa: E402
from qlora_jax.memory.compile import compile_for  # noqa: E402
from qlora_jax.memory.plan import plan  # noqa: E402
from qlora_jax.memory.train_step import abstract_train_step  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "memory-targets.json"
PAGE = ROOT / "docs" / "memory.md"
FEW_LAYERS = 4


def config_of(row: Row, layers: int | None, folder: Path) -> Config:
    """The row's configuration; with fewer layers, its geometry is written to `folder`."""
    config = load_config(ROOT / "configs" / f"{row.config}.py", [f"--config.{words}" for words in row.overrides])
    if layers is None:
        return config
    geometry = json.loads(Path(config.model.geometry).read_text())
    if kinds := geometry.get("layer_types"):
        layers = max(layers, kinds.index("full_attention") + 1)  # one of each kind
        geometry["layer_types"] = kinds[:layers]
    geometry["num_hidden_layers"] = layers
    file = folder / "config.json"
    file.write_text(json.dumps(geometry))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, geometry=str(file)))


def measure(row: Row, gpu: str, layers: int | None = None) -> dict[str, int]:
    """The bytes of the row's compiled step, with all its layers or with fewer; `host`: what lies there, by the plan."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(row, layers, Path(folder))
        compiled = compile_for(*abstract_train_step(config), gpu)
        return {**device_bytes(compiled), "host": plan(config, read_config(Path(config.model.geometry))).host}


def result(row: Row, gpu: str) -> dict:
    """A row of the result file."""
    whole, few = measure(row, gpu), measure(row, gpu, FEW_LAYERS)
    return {
        "index": ROWS.index(row),
        "name": row.name,
        "adapters": row.adapters,
        "tokens": row.tokens,
        "fields": [f"configs/{row.config}.py", *row.overrides],
        "gpu": gpu,
        **whole,
        "peak_of_few_layers": few["peak"],
        "limit": row.limit,
        "peer": row.peer,
        "passed": whole["peak"] <= row.limit,
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| model | adapters | tokens | card | compiled peak | at most | held | host memory | fields |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        host = f"{row['host'] / 1e9:.1f} GB" if row["host"] else "-"
        limit = f"{row['limit'] / 1e9:.2f} GB" + (f" ({row['peer']})" if row["peer"] else "")
        lines.append(
            f"| {row['name']} | {row['adapters']} | {row['tokens']} | {row['gpu']} | {row['peak'] / 1e9:.2f} GB "
            f"| {limit} | {'yes' if row['passed'] else 'no'} | {host} | {' '.join(f'`{f}`' for f in row['fields'])} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: list[dict]) -> None:
    """The result file, and the table between the page's markers; rows that were not measured now stay as they were."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")}
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    known = {(row["index"], row["gpu"]): row for row in (*old, *rows)}
    rows = [known[index, gpu] for index, row in enumerate(ROWS) for gpu in row.gpus if (index, gpu) in known]
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    fill_part(PAGE, "memory-table", table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, action="append", metavar="N", help=f"0 to {len(ROWS) - 1}; all where none")
    chosen = [ROWS[index] for index in parser.parse_args().row or range(len(ROWS))]
    rows = []
    for row in chosen:
        for gpu in row.gpus:
            rows.append(result(row, gpu))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    write(rows)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    raise SystemExit(main())
