"""What does rounding a model to 4 bits cost? Perplexity of held-out text and error of the weights, format by format.

    JAX_PLATFORMS=cpu python benchmarks/quantization_error.py [--model DIR] [--data FILE] [--out FILE]

NF4 (with and without double quantization) beside FP4 and Int4, each rounding the projections that QLoRA stores in NF4;
no adapter, no training. For the demo's base (the default, about a minute) the figures go to
benchmarks/results/quantization-error.json and to docs/quality.md; for another model to --out, if given.
"""

import argparse
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.compare.formats import FORMATS, projections, round_model  # noqa: E402
from qlora_jax.config import Pieces  # noqa: E402
from qlora_jax.data import eval_batches, load_rows, load_tokenizer, pad_id  # noqa: E402
from qlora_jax.data.encoding import encode_rows  # noqa: E402
from qlora_jax.io.hf import load_model, read_config, resolve_folder  # noqa: E402
from qlora_jax.objective import SFT  # noqa: E402
from qlora_jax.quant.rules import rules_for  # noqa: E402
from qlora_jax.run.evaluate import sequence_length  # noqa: E402
from qlora_jax.training.step import evaluate, make_eval_step, split_model  # noqa: E402

BASE, DATA = ROOT / "demo" / "base", ROOT / "demo" / "heldout.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "quantization-error.json"
PAGE = ROOT / "docs" / "quality.md"
# Of NF4 with double quantization, in perplexity (the seed's promise is about 1 %).
BAR = 0.01
WORDS = {
    "none": "none (the 16-bit base)",
    "nf4-dq": "NF4, double quantization (QLoRA's)",
    "nf4": "NF4",
    "fp4-e2m1": "FP4 E2M1",
    "fp4-bnb": "FP4 of bitsandbytes",
    "fp4-e3m0": "FP4 E3M0",
    "int4": "Int4",
}


def batches(folder: Path, data: Path) -> list:
    """The held-out rows; every token but the first of a row is scored."""
    tokenizer = load_tokenizer(str(folder))
    length = sequence_length(None, read_config(folder).max_position)
    documents = encode_rows(load_rows(str(data)), tokenizer, seq_len=length, train_on="all", chat_template=None)
    return list(eval_batches(documents, seq_len=length, batch_size=8, pad_id=pad_id(tokenizer)))


def measure(folder: Path, name: str, rows: list) -> dict:
    """One format's row; `weight_error`: root mean square of the difference, as a share of the weights' own."""
    model = load_model(folder, dtype="float32", rules=rules_for("none")).model
    before = [linear.weight.get_value() for linear in projections(model)]
    if name != "none":
        round_model(model, name)
    after = [linear.weight.get_value() for linear in projections(model)]
    wrong = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(before, after, strict=True))
    parts = split_model(model)
    step = make_eval_step(parts.graphdef, SFT(), Pieces(loss_chunk=1024, vocab_chunk=16384))
    found = evaluate(step, parts, rows)
    loss, tokens = found["loss"], found["tokens"]
    error = math.sqrt(wrong / sum(float(jnp.sum(weight**2)) for weight in before))
    return {"format": name, "loss": loss, "perplexity": math.exp(loss), "weight_error": error, "tokens": tokens}


def with_cost(rows: list[dict]) -> list[dict]:
    """The rows, each with its perplexity beyond the first one's, as a share of that."""
    return [row | {"cost": row["perplexity"] / rows[0]["perplexity"] - 1} for row in rows]


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| format | perplexity | against the 16-bit base | error of the weights |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {WORDS[row['format']]} | {row['perplexity']:.3f} | {row['cost']:+.2%} | {row['weight_error']:.2%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def verdict(rows: list[dict]) -> str:
    """What NF4 costs, in a sentence."""
    cost = next(row["cost"] for row in rows if row["format"] == "nf4-dq")
    held = "within" if cost <= BAR else "MISSING"
    return f"NF4 with double quantization costs {cost:.2%} of perplexity, {held} the bar of {BAR:.0%}.\n"


def main() -> int:
    """Prints the table and stores the figures; exit code 1 where NF4 misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), metavar="DIR", help="a Hugging Face model; the demo's base")
    parser.add_argument("--data", default=str(DATA), metavar="FILE", help="held-out text, in any training format")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to store another model's figures, as JSON")
    options = parser.parse_args()
    folder, own = resolve_folder(options.model), (options.model, options.data) == (str(BASE), str(DATA))
    held_out = batches(folder, options.data)
    rows = with_cost([measure(folder, name, held_out) for name in WORDS])
    print(table(rows) + "\n" + verdict(rows))
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    result = {"model": folder.name, "data": Path(options.data).name, "versions": versions, "rows": rows}
    file = RESULT if own else options.out
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    if own:
        fill_part(PAGE, "formats", table(rows) + "\n" + verdict(rows))
    return 0 if rows[1]["cost"] <= BAR else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    assert set(WORDS) - {"none"} == set(FORMATS)
    raise SystemExit(main())
