"""What do 8 and 4 bits cost in the embedding and in the output layer? Held-out loss of the demo's base, on a CPU.

    JAX_PLATFORMS=cpu python benchmarks/head_quality.py

The decoder's projections are in NF4 throughout. The demo's embedding is tied: here its table is given to both layers,
so that each can be stored in its own way. Prints a table and writes benchmarks/results/head-quality.json.
"""

import dataclasses
import itertools
import json
from importlib.metadata import version
from pathlib import Path

import jax

from qlora_jax.config import Pieces, QuantSection
from qlora_jax.data import eval_batches, load_rows, load_tokenizer, pad_id
from qlora_jax.data.encoding import encode_rows
from qlora_jax.io.build import build_model
from qlora_jax.io.hf import read_config
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.params import Tensor
from qlora_jax.objective import SFT
from qlora_jax.quant.rules import Rules, packed
from qlora_jax.training.step import evaluate, make_eval_step, split_model

# What configurations offer for the two tables.
FORMATS = ("none", "nf4", "int8")
ROOT = Path(__file__).resolve().parent.parent
BASE, DATA = ROOT / "demo" / "base", ROOT / "demo" / "tasks" / "test.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "head-quality.json"


def batches() -> list:
    """The held-out rows; every token is scored."""
    tokenizer = load_tokenizer(str(BASE))
    documents = encode_rows(load_rows(str(DATA)), tokenizer, seq_len=64, train_on="all", chat_template=None)
    return list(eval_batches(documents, seq_len=64, batch_size=32, pad_id=pad_id(tokenizer)))


def loss(rules: Rules, rows: list) -> tuple[float, int]:
    """Mean negative log-likelihood of a token in nats, and how many were scored."""
    tensors, config = TensorFolder(BASE), dataclasses.replace(read_config(BASE), tie_embeddings=False)

    def read(tensor: Tensor):
        return tensors.read("model.embed_tokens.weight" if tensor.name == "lm_head.weight" else tensor.name)

    parts = split_model(build_model(config, read, dtype="float32", rules=rules))
    step = make_eval_step(parts.graphdef, SFT(), Pieces(loss_chunk=512, vocab_chunk=1024))
    found = evaluate(step, parts, rows)
    return found["loss"], int(found["tokens"])


def main() -> None:
    rows = batches()
    unquantized, tokens = loss(None, rows)
    print(f"{tokens} tokens; nothing quantized: {unquantized:.4f} nats\n\nembedding  lm_head    loss   difference")
    table = []
    for embedding, lm_head in itertools.product(FORMATS, FORMATS):
        value, _ = loss(packed(QuantSection(embedding=embedding, lm_head=lm_head)), rows)
        table.append({"embedding": embedding, "lm_head": lm_head, "loss": value})
        print(f"{embedding:10} {lm_head:7} {value:8.4f} {value - table[0]['loss']:+9.4f}", flush=True)
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    result = {"tokens": tokens, "unquantized": unquantized, "versions": versions, "rows": table}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
