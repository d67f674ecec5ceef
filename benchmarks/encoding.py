"""How fast rows become documents, and what they take: `python benchmarks/encoding.py [--rows N]`.

Prints, for chats of the demo's base: rows a second beside transformers' `apply_chat_template`, called for one row after
the other in the same run; how long a second start takes, which finds them on disk; and the memory that the rows add,
over the bytes of their tokens. Each figure is of a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from qlora_jax.config import Config, DataSection, TrainSection  # noqa: E402
from qlora_jax.data import load_tokenizer  # noqa: E402
from qlora_jax.training.dataset import prepare  # noqa: E402

BASE = str(Path(__file__).parents[1] / "demo" / "base")
ANSWER = " and the answer goes on for a sentence or two, as answers do."


def write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            question = {"role": "user", "content": f"What is {i} times {i % 97}? Say it in words, please."}
            answer = {"role": "assistant", "content": f"It is {i * (i % 97)}" + ANSWER * (1 + i % 5)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


def encode(path: str, results) -> None:
    """Puts (seconds, bytes added, bytes of the tokens) of reading and encoding the file as training does."""
    config = Config(train=TrainSection(seq_len=512), data=DataSection(train=path, packing=False))
    tokenizer = load_tokenizer(BASE)
    tokenizer("warm up")
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    documents = prepare(config, tokenizer).batches.encoded
    seconds = time.perf_counter() - started
    results.put((seconds, psutil.Process().memory_info().rss - before, 4 * int(documents.lengths.sum())))


def one_by_one(path: str, results) -> None:
    """Puts the seconds that transformers' own template and tokenizer take for a tenth of the rows, row by row."""
    tokenizer = load_tokenizer(BASE)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[::10]]
    started = time.perf_counter()
    for row in rows:
        tokenizer.apply_chat_template(row["messages"])
    results.put(time.perf_counter() - started)


def run(function, *arguments):
    """What the function puts, called in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    found = results.get(timeout=3600)
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "rows.jsonl"
        write_rows(path, count)
        first, added, tokens = run(encode, str(path))
        second, added_again, _ = run(encode, str(path))
        alone = 10 * run(one_by_one, str(path))
        print(f"{count:,} rows, {path.stat().st_size / 2**20:.1f} MiB of JSONL, {tokens / 2**20:.1f} MiB of tokens")
        print(
            f"first start   {first:8.1f} s   {count / first:10,.0f} rows/s   {added / tokens:5.2f} x the tokens' bytes"
        )
        print(f"second start  {second:8.1f} s   {first / second:10.1f} x faster   {added_again / tokens:5.2f} x")
        print(f"transformers, row by row, ids only: {alone:.1f} s, {alone / first:.2f} x the first start")


if __name__ == "__main__":
    main()
