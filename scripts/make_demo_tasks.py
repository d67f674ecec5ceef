"""Makes demo/tasks: short instructions with one right answer each, in words that the demo's base knows.

    python scripts/make_demo_tasks.py           needs demo/base/tokenizer.json

Every prompt occurs once in all three files together, so that the validation and test rows are new to the model.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from make_demo_base import BASE, ROOT, collect
from tokenizers import Tokenizer

TASKS = ROOT / "demo" / "tasks"
SIZES = {"train": 3072, "validation": 128, "test": 256}
SEED = 0

Words = list[str]
# (instruction, answer) of some words. A task draws its words' number itself.
Task = Callable[[random.Random, Words], tuple[str, Words, str]]


def first(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, rng.randint(2, 6))
    return "Write the first word", words, words[0]


def last(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, rng.randint(2, 6))
    return "Write the last word", words, words[-1]


def after(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, rng.randint(3, 6))
    place = rng.randrange(len(words) - 1)
    return f"Write the word after {words[place]}", words, words[place + 1]


def repeat(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, rng.randint(2, 6))
    return "Repeat the words", words, " ".join(words)


def swap(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, 2)
    return "Swap the words", words, f"{words[1]} {words[0]}"


def count(rng: random.Random, vocabulary: Words) -> tuple[str, Words, str]:
    words = rng.sample(vocabulary, rng.randint(1, 6))
    return "Count the words", words, str(len(words))


MAKERS: dict[str, Task] = {task.__name__: task for task in (first, last, after, repeat, swap, count)}


def known_words(tokenizer: Tokenizer, texts: Words, at_least: int = 20) -> Words:
    """Lower-case words of four letters and more that are one token after a space, and whole words in the text."""
    counts = Counter(re.findall(r"(?<= )[a-z]{4,}(?![\w'])", "\n".join(texts)))
    return sorted(
        word
        for word, n in counts.items()
        if n >= at_least and len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1
    )


def rows(vocabulary: Words) -> Iterator[dict[str, str]]:
    """Endless rows, the tasks in turn, no prompt twice."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    while True:
        for name, task in MAKERS.items():
            instruction, words, answer = task(rng, vocabulary)
            prompt = f"{instruction}: {' '.join(words)}\nAnswer:"
            if prompt not in seen:
                seen.add(prompt)
                yield {"prompt": prompt, "completion": f" {answer}", "task": name}


def main() -> None:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    vocabulary = known_words(tokenizer, collect())
    endless = rows(vocabulary)
    TASKS.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        lines = [json.dumps(next(endless)) for _ in range(size)]
        (TASKS / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(vocabulary)} words, {', '.join(f'{n} {split}' for split, n in SIZES.items())} rows")


if __name__ == "__main__":
    main()
