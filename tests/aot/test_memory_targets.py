"""The memory of docs/memory.md, with few layers: what a row of it takes does not grow."""

import json

import jax
import pytest

from benchmarks.memory_rows import ROWS
from benchmarks.memory_targets import FEW_LAYERS, PAGE, RESULT, measure, table

RECORDED = json.loads(RESULT.read_text())
JAX = RECORDED["versions"]["jax"]


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.skipif(jax.__version__ != JAX, reason=f"measured with jax {JAX}: versions differ by more than 2 %")
@pytest.mark.parametrize(
    "recorded",
    [row for row in RECORDED["rows"] if row["gpu"] == ROWS[row["index"]].gpus[0]],
    ids=lambda row: f"{row['name']}-{row['adapters']}-{row['tokens']}",
)
def test_memory_does_not_grow(recorded):
    peak = measure(ROWS[recorded["index"]], recorded["gpu"], FEW_LAYERS)["peak"]
    assert peak <= 1.02 * recorded["peak_of_few_layers"]


def test_the_page_shows_the_recorded_rows():
    assert table(RECORDED["rows"]) in PAGE.read_text()


def test_the_record_is_of_the_rows_as_they_are():
    fields = [(row["index"], row["fields"][1:], row["limit"]) for row in RECORDED["rows"]]
    assert fields == [(i, list(row.overrides), row.limit) for i, row in enumerate(ROWS) for _ in row.gpus]
