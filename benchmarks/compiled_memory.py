"""What memory does the train step of each shipped config need? The peak that XLA's compiler states, without a GPU.

    pip install -e '.[plan]'; JAX_PLATFORMS=cpu python benchmarks/compiled_memory.py [--gpu h200] [CONFIG …]

Prints a line per config with the plan's arithmetic beside it, and writes benchmarks/results/compiled-memory.json. The
README's table and the configs' headers are filled from that file by `--write`.
"""

import argparse
import json
import re
from importlib.metadata import version
from pathlib import Path

import jax

from qlora_jax.config import Config, load_config
from qlora_jax.device.facts import device_bytes
from qlora_jax.io.hf import read_config
from qlora_jax.lora import resolve_targets
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.plan import plan
from qlora_jax.memory.train_step import abstract_train_step
from qlora_jax.models import linear_modules
from qlora_jax.models.adapters import adapter_count

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compiled-memory.json"
CONFIGS = ("7b", "guanaco_7b", "8b", "13b", "65b", "70b")


def measure(name: str, gpu: str) -> dict:
    """One row: the config's geometry, its adapters, and the bytes of its compiled step."""
    config = load_config(ROOT / "configs" / f"{name}.py", ["--config.model.weights=random"])
    geometry = read_config(Path(config.model.geometry))
    targets = resolve_targets(config.lora, linear_modules(geometry))
    step, arguments = abstract_train_step(config)
    return {
        "config": name,
        "model": Path(config.model.geometry).stem,
        "adapters": describe(config),
        "trainable": adapter_count(geometry, targets),
        "tokens": config.train.batch_size * config.train.seq_len,
        **device_bytes(compile_for(step, arguments, gpu)),
        "arithmetic": plan(config, geometry).peak,
    }


def describe(config: Config) -> str:
    targets = config.lora.targets
    return f"r {config.lora.rank} {targets if isinstance(targets, str) else ','.join(targets)}"


def write_pages(rows: list[dict], gpu: str) -> None:
    """Puts the figures where readers look for them: the README's table and the configs' `Memory:` lines."""
    lines = [
        f"| `configs/{r['config']}.py` | {r['model']} | {r['adapters']} "
        f"| {r['peak'] / 1e9:.2f} GB at {r['tokens']} tokens |"
        for r in rows
    ]
    readme = ROOT / "README.md"
    table = re.compile(r"(\| config \| model \|.*\n\| ---.*\n)(?:\|.*\n|@MEMORY_TABLE@\n)+")
    readme.write_text(table.sub(lambda m: m[1] + "\n".join(lines) + "\n", readme.read_text()))
    for row in rows:
        file = ROOT / "configs" / f"{row['config']}.py"
        peak = f"{row['peak'] / 1e9:.2f} GB"
        text = f"Memory:  {peak}, the compiled peak of the train step for {gpu} ({row['tokens']} tokens)"
        file.write_text(re.sub(r"Memory: .*", text, file.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--write", action="store_true", help="put the figures into README.md and configs/")
    options = parser.parse_args()
    rows = []
    for name in options.configs:
        row = measure(name, options.gpu)
        rows.append(row)
        print(
            f"{name:12} {row['peak'] / 1e9:7.3f} GB compiled, {row['arithmetic'] / 1e9:7.3f} GB by arithmetic "
            f"({row['arithmetic'] / row['peak'] - 1:+.1%}) = arguments {row['arguments'] / 1e9:.3f} + temporaries "
            f"{row['temporaries'] / 1e9:.3f} + outputs {row['outputs'] / 1e9:.3f} - aliases {row['aliases'] / 1e9:.3f}",
            flush=True,
        )
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "jax-cuda13-plugin")}
    if tuple(options.configs) == CONFIGS:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"gpu": options.gpu, "versions": versions, "rows": rows}, indent=2) + "\n")
    if options.write:
        write_pages(rows, options.gpu)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
