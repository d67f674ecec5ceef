"""compare.json: the figures of a comparison, each of which can be computed again from others in it."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from qlora_jax.compare.study import Outcome, Run, Study
from qlora_jax.config import to_dict
from qlora_jax.report.methods import TITLES

Row = dict[str, Any]
# Figures of a run over which a row gives mean, lowest and highest.
MEASURED = ("heldout_loss", "exact_match", "gain_kept", "exact_match_kept", "train_loss", "tokens_per_second")
# The end of training over which its loss is averaged: a single batch's is too noisy.
LAST = 0.1


def comparison(study: Study, outcomes: Sequence[Outcome], memory: Row, about: Row) -> Row:
    """The whole compare.json; `memory` and `about` (machine, versions) are put in as they are.

    gain_kept is (base - method) / (base - full) of the held-out loss, with full's mean over its seeds;
    exact_match_kept the same of exact matches, which is null where rows have none or full gains nothing.
    """
    base = base_row(next(one for one in outcomes if one.method.name == "lora"))
    runs = {one.method.name: [run_row(run) for run in one.runs] for one in outcomes}
    for rows in runs.values():
        for row in rows:
            for name, figure in (("gain_kept", "heldout_loss"), ("exact_match_kept", "exact_match")):
                row[name] = share(base[figure], row[figure], mean(one[figure] for one in runs["full"]))
    rows = [base, *(method_row(one, runs[one.method.name]) for one in reversed_main(outcomes))]
    return {
        "mode": study.mode,
        "config": to_dict(study.config),
        "seeds": study.seeds,
        "rows": rows,
        "search": [search_row(study, one) for one in outcomes],
        "memory": memory,
        **about,
    }


def reversed_main(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The three methods from full to QLoRA, as people expect them, then the rest."""
    return [*outcomes[2::-1], *outcomes[3:]]


def base_row(lora: Outcome) -> Row:
    """The 16-bit base before training, which LoRA's untrained adapters leave as it is."""
    first = lora.runs[0]
    found = first.evaluation(0)
    row: Row = {"method": "base", "title": TITLES["base"], "seeds": [], "learning_rate": None, "trainable": 0}
    row |= {"parameters": first.summary["parameters"], "peak_bytes": None, "device_peak_bytes": None}
    row |= {"heldout_loss": found["eval_loss"], "exact_match": found.get("exact_match")}
    kept = {"gain_kept": 0.0, "exact_match_kept": None if row["exact_match"] is None else 0.0}
    return row | kept | {"train_loss": None, "tokens_per_second": None, "spread": {}, "runs": []}


def run_row(run: Run) -> Row:
    """One whole run's figures."""
    steps = [row for row in run.rows if row.get("loss") is not None]
    last = steps[-max(round(LAST * len(steps)), 1) :]
    found = run.evaluation()
    return {
        "seed": run.seed,
        "folder": f"{run.folder.parent.name}/{run.folder.name}",
        "heldout_loss": found["eval_loss"],
        "exact_match": found.get("exact_match"),
        "train_loss": mean(row["loss"] for row in last),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "losses": [[row["step"], row["loss"]] for row in steps],
    }


def method_row(outcome: Outcome, runs: list[Row]) -> Row:
    """A method's figures: means over its seeds, and between what they lie."""
    first = [run.summary for run in outcome.runs]
    simulated = outcome.method.base_format is not None
    means = {name: mean(run[name] for run in runs) for name in MEASURED}
    return {
        "method": outcome.method.name,
        "title": outcome.method.title,
        "seeds": [run["seed"] for run in runs],
        "learning_rate": outcome.rate,
        "trainable": first[0]["trainable"],
        "parameters": first[0]["parameters"],
        # Weights rounded to a format that nothing here stores lie in 16 bits: their memory says nothing.
        "peak_bytes": None if simulated else largest(one["compiled_bytes"] for one in first),
        "device_peak_bytes": None if simulated else largest(one["device_peak_bytes"] for one in first),
        **means,
        "spread": {name: between(run[name] for run in runs) for name in MEASURED},
        "runs": runs,
    }


def search_row(study: Study, outcome: Outcome) -> Row:
    """Which learning rates were tried, with the validation losses (null: diverged), and which was chosen."""
    tried = [
        {"learning_rate": rate, "validation_loss": loss if math.isfinite(loss) else None}
        for rate, loss in outcome.search.items()
    ]
    return {"method": outcome.method.name, "seed": study.seeds[0], "tried": tried, "chosen": outcome.rate}


def mean(values) -> float | None:
    """Of numbers; None where one is None."""
    values = list(values)
    return None if None in values else math.fsum(values) / len(values)


def between(values) -> list[float] | None:
    """[lowest, highest]; None where a value is None."""
    values = list(values)
    return None if None in values else [min(values), max(values)]


def largest(values) -> int | None:
    """The largest of those that are known: a run that was continued may have none."""
    return max((value for value in values if value is not None), default=None)


def share(base: float | None, method: float | None, full: float | None) -> float | None:
    """What a method keeps of the full fine-tune's gain over the base; None where there is nothing to keep."""
    if base is None or method is None or full is None or full == base:
        return None
    return (method - base) / (full - base)
