"""What a checkpoint takes for granted: rows, chat template, and the steps that its learning rate was planned for.

It is recorded with every checkpoint, and compared before a run goes on from one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import xxhash

from qlora_jax.config import Config, from_dict
from qlora_jax.data import Encoded
from qlora_jax.data.documents import lengths
from qlora_jax.data.tokenizer import identity
from qlora_jax.training.dataset import Dataset
from qlora_jax.training.optimizer import learning_rate

ROWS = {"rows": "the training rows", "eval_rows": "the evaluation rows"}


def assumptions(dataset: Dataset, tokenizer: Any, steps: int) -> dict[str, Any]:
    """As JSON: the rows as they are learned from, what made them of the files, and the length of the run."""
    return {
        "rows": _rows(dataset.batches.encoded),
        "eval_rows": _rows(dataset.eval_documents),
        "chat_template": None if tokenizer is None else _of_json(tokenizer.chat_template),
        "tokenizer": None if tokenizer is None else identity(tokenizer),
        "batches": len(dataset.batches),
        "steps": steps,
    }


def changes(meta: Mapping[str, Any], now: Mapping[str, Any], config: Config) -> list[str]:
    """In words, what a run assumes otherwise now than the checkpoint with this `meta`, which may be of a version that
    recorded less."""
    step, was, before = meta["step"], meta.get("assumes", {}), from_dict(meta["config"])
    same_eval = config.train.eval_rows == before.train.eval_rows  # else the rows were chosen to be others
    found = [
        f"{words} are others ({_shown(was[name])} then, {_shown(now[name])} now{_cause(was, now)})"
        for name, words in ROWS.items()
        if name in was and was[name] != now[name] and (name == "rows" or same_eval)
    ]
    if not found and was.get("chat_template", now["chat_template"]) != now["chat_template"]:
        found.append("the chat template is another")
    planned = was.get("steps") or before.train.steps or _steps_of(before, now)
    return found + _bent_schedule(step, before, planned, config, now["steps"])


def _rows(documents: Sequence[Encoded]) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    for one in documents:
        digest.update(len(one.ids).to_bytes(4))
        digest.update(one.ids.tobytes())
        digest.update(one.scored.tobytes())
    return {"digest": digest.hexdigest(), "count": len(documents), "tokens": int(lengths(documents).sum())}


def _of_json(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(rows: Mapping[str, Any]) -> str:
    return f"{rows['count']:,} with {rows['tokens']:,} tokens"


def _cause(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = {"chat_template": "chat template", "tokenizer": "tokenizer"}
    found = [words for name, words in names.items() if name in was and was[name] != now[name]]
    return f"; the {' and the '.join(found)} changed" if found else ""


def _steps_of(before: Config, now: Mapping[str, Any]) -> int:
    """The steps of a run that recorded epochs only: of the same rows, which is all that can be known."""
    return math.ceil(before.train.epochs * now["batches"])


def _bent_schedule(step: int, before: Config, planned: int, config: Config, steps: int) -> list[str]:
    """The learning rate, where it does not go on as it was planned at the checkpoint."""
    coming = jnp.arange(step, max(step + 1, min(planned, steps)))
    rates = (learning_rate(c.optim, n)(coming) for c, n in ((before, planned), (config, steps)))
    old, new = (np.broadcast_to(np.asarray(rate), coming.shape) for rate in rates)  # a constant one is a number
    differs = np.flatnonzero(~np.isclose(old, new, rtol=1e-4, atol=1e-6 * config.optim.learning_rate))
    if not differs.size:
        return []
    at = differs[0]
    return [
        f"the learning rate of step {step + at + 1} was to be {old[at]:.3g} in a run of {planned} steps with "
        f"optim.schedule={before.optim.schedule}, and is {new[at]:.3g} in one of {steps} with {config.optim.schedule}"
    ]
