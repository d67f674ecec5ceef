"""Loading a checkpoint and quantizing it on the way, beside only reading its files."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from benchmarks.gpu.context import Context
from qlora_jax.io.hf import load_model, read_config
from qlora_jax.io.shards import write_shards
from qlora_jax.models.table import tensors as tensors_of
from qlora_jax.quant.rules import rules_for

POOL = 1 << 24
CHUNK = 1 << 24


def tensors(config) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint; values are taken from one pool of normal ones, which drawing all would outlast."""
    pool = (np.random.default_rng(0).standard_normal(POOL, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    for tensor in tensors_of(config):
        yield from (
            (part.name, np.resize(np.roll(pool, 1009 * tensor.numbers.get("layer", 0)), part.whole))
            for part in tensor.parts
        )


def write_checkpoint(folder: Path, geometry: Path, layers: int) -> None:
    """A folder as the Hub has them: config.json and bfloat16 safetensors."""
    values = json.loads(geometry.read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(values))
    write_shards(folder, tensors(read_config(folder)))


def read_files(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of reading the files through once."""
    buffer, total = bytearray(CHUNK), 0
    began = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return time.perf_counter() - began, total


def load(folder: Path) -> float:
    """Seconds until a packed model is on the device."""
    began = time.perf_counter()
    loaded = load_model(folder, dtype="bfloat16", rules=rules_for("nf4"))
    jax.block_until_ready(jax.tree.leaves(nnx.state(loaded.model)))
    return time.perf_counter() - began


def run(context: Context) -> None:
    """GB of checkpoint per second; the files are in the page cache, which both figures then have."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_checkpoint(folder, context.sizes.geometry, context.sizes.load_layers)
        read_files(folder)
        seconds, total = read_files(folder)
        first, second = load(folder), load(folder)
    rate = total / 1e9 / seconds
    context.row("read the files of a checkpoint", rate, "GB/s", note=f"{total / 1e9:.3g} GB")
    note = f"{second:.3g} s for {context.sizes.load_layers} layers; {first:.3g} s the first time, with compiling"
    context.row("load and quantize a checkpoint", total / 1e9 / second, "GB/s", reference=rate, note=note)
