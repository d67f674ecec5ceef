"""Makes demo/tasks: short questions about Python and about words, each with one right answer.

    python scripts/make_demo_tasks.py

Every prompt occurs once in all three files together, so that the validation and test rows are new to the model.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

TASKS = Path(__file__).resolve().parents[1] / "demo" / "tasks"
SIZES = {"train": 3072, "validation": 128, "test": 256}
SEED = 0

NAMES = [
    "name",
    "value",
    "item",
    "path",
    "line",
    "size",
    "text",
    "data",
    "file",
    "index",
    "result",
    "number",
    "key",
    "count",
    "other",
    "output",
]
WORDS = ["list", "string", "object", "function", "class", "module", "method", "error"]
OPERATORS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide", "==": "equal", "<": "less", ">": "greater"}
STATEMENTS = {
    "for {a} in {b}:": "loop",
    "while {a} < {n}:": "loop",
    "def {a}({b}):": "function",
    "class {a}({b}):": "class",
    "import {a}": "import",
    "from {a} import {b}": "import",
    "{a} = {b} + {n}": "assignment",
    "{a} = {n}": "assignment",
    "return {a} + {n}": "return",
    "raise {a}({b})": "error",
    "if {a} == {n}:": "condition",
}

# A task draws (what is asked about, the answer).
Task = Callable[[random.Random], tuple[str, str]]


def number(rng: random.Random) -> int:
    """A number of one to four digits, all lengths alike."""
    return rng.randrange(10 ** rng.randrange(1, 5))


def literal(rng: random.Random) -> tuple[str, str]:
    """The type of a literal."""
    a, b, n, m = rng.choice(NAMES), rng.choice(NAMES), number(rng), number(rng)
    kinds = {
        "int": [f"{n}"],
        "float": [f"{n}.{m}"],
        "str": [f"'{a} {b}'", f"'{a}{n}'"],
        "list": [f"[{n}, {m}]", f"[{a}, {n}]"],
        "tuple": [f"({n}, {m})", f"({a}, {b})"],
        "dict": [f"{{{n}: {m}}}", f"{{'{a}': {n}}}"],
        "set": [f"{{{n}, {m}}}", f"{{{a}, {b}}}"],
    }
    kind = rng.choice(sorted(kinds))
    return f"type of {rng.choice(kinds[kind])}", kind


def parity(rng: random.Random) -> tuple[str, str]:
    """Whether a digit is even; two words before it make the prompts differ."""
    a, b, n = rng.choice(NAMES), rng.choice(NAMES), rng.randrange(10)
    return f"even or odd, {a} {b} {n}", "odd" if n % 2 else "even"


def statement(rng: random.Random) -> tuple[str, str]:
    """The kind of a statement."""
    form = rng.choice(sorted(STATEMENTS))
    return f"kind of {form.format(a=rng.choice(NAMES), b=rng.choice(NAMES), n=number(rng))}", STATEMENTS[form]


def operator(rng: random.Random) -> tuple[str, str]:
    """The name of an operator."""
    sign = rng.choice(sorted(OPERATORS))
    left, right = (rng.choice([rng.choice(NAMES), str(number(rng))]) for _ in range(2))
    return f"operator of {left} {sign} {right}", OPERATORS[sign]


def count(rng: random.Random) -> tuple[str, str]:
    """How many words there are."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 6))]
    return f"how many words, {' '.join(words)}", str(len(words))


def last(rng: random.Random) -> tuple[str, str]:
    """The last one of some words."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 6))]
    return f"last word, {' '.join(words)}", words[-1]


MAKERS: tuple[Task, ...] = (literal, parity, statement, operator, count, last)


def rows() -> Iterator[dict[str, str]]:
    """Endless rows, the tasks in turn, no prompt twice."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    while True:
        for task in MAKERS:
            question, answer = task(rng)
            while question in seen:
                question, answer = task(rng)
            seen.add(question)
            yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", "task": task.__name__}


def main() -> None:
    endless = rows()
    TASKS.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        lines = [json.dumps(next(endless)) for _ in range(size)]
        (TASKS / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    print(", ".join(f"{size} {split}" for split, size in SIZES.items()), "rows")


if __name__ == "__main__":
    main()
