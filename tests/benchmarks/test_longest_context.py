"""benchmarks/longest_context.py: how it closes in on a length, with a stand-in for the compiler."""

import json

import pytest

from benchmarks import longest_context
from benchmarks.memory_rows import LONG_ROWS

ROW = LONG_ROWS[24][1]


def compiled(monkeypatch, bytes_of):
    asked = []

    def measure(row, gpu):
        [tokens] = (int(one.split("=")[1]) for one in row.overrides if one.startswith("train.seq_len="))
        assert f"model.max_position={tokens}" in row.overrides and gpu == "rtx4090"
        asked.append(tokens)
        return {"peak": bytes_of(tokens), "temporaries": bytes_of(tokens) - 10**9, "host": 262_144 * tokens}

    monkeypatch.setattr(longest_context, "measure", measure)
    return asked


@pytest.mark.parametrize("proposal", [50_048, 400_000])
def test_a_length_just_within_the_card(monkeypatch, proposal):
    asked = compiled(monkeypatch, lambda tokens: 5 * 10**9 + 100_000 * tokens)
    monkeypatch.setattr(longest_context, "proposed", lambda row: proposal)
    found = longest_context.longest(ROW)
    assert 0.995 * ROW.limit <= found["peak"] <= ROW.limit
    assert found["tokens"] == asked[-1] and found["tokens"] % 64 == 0 and len(asked) <= 4


def test_nothing_fits(monkeypatch):
    compiled(monkeypatch, lambda tokens: 10**12)
    monkeypatch.setattr(longest_context, "proposed", lambda row: 64)
    monkeypatch.setattr(longest_context, "corrected", lambda row, peaks: 64 + 64 * len(peaks))
    with pytest.raises(SystemExit, match="none of .* tokens fits 23.3 GB"):
        longest_context.longest(ROW)


def test_the_page_shows_the_stored_figures():
    stored = json.loads(longest_context.RESULT.read_text())["rows"]
    assert longest_context.table(stored) in longest_context.PAGE.read_text()
    assert [row["card"] for row in stored] == list(LONG_ROWS)
    assert all(row["tokens"] >= row["peer"] and row["peak"] <= row["limit"] for row in stored)
