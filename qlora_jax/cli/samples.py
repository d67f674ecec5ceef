"""Answers of a model to evaluation rows: for the report's before/after samples and for exact match."""

from collections.abc import Sequence

from qlora_jax.data import Encoded
from qlora_jax.generate import Generator, prompt_of

BATCH = 64


def answer(generator: Generator, tokenizer, documents: Sequence[Encoded], *, max_new_tokens: int = 48) -> list[str]:
    """The greedy answer to each document's prompt (its ids up to the first scored one)."""
    prompts = [prompt_of(document.ids, document.scored) for document in documents]
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        group = prompts[start : start + BATCH]
        # A last group of full size keeps the compiled shape.
        filled = group + [group[0]] * (BATCH - len(group) if start else 0)
        new = generator.generate(filled, max_new_tokens=max_new_tokens)
        texts += [tokenizer.decode(ids, skip_special_tokens=True) for ids in new[: len(group)]]
    return texts


def expected(tokenizer, document: Encoded) -> str:
    """The text of a document's scored tokens."""
    return tokenizer.decode(document.ids[document.scored], skip_special_tokens=True)


def shown_prompt(tokenizer, document: Encoded) -> str:
    """The text that precedes the answer."""
    return tokenizer.decode(prompt_of(document.ids, document.scored), skip_special_tokens=True)


def exact_match(answers: Sequence[str], documents: Sequence[Encoded], tokenizer) -> float:
    """Share of answers that equal the expected text but for surrounding white space."""
    hits = [a.strip() == expected(tokenizer, d).strip() for a, d in zip(answers, documents, strict=True)]
    return sum(hits) / len(hits)
