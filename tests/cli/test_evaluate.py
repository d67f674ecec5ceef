"""Figures of models whose loss is not one that anybody hopes for."""

import json
import math

import pytest

from qlora_jax.cli import evaluate
from qlora_jax.training import step
from tests.cli.commands import exit_code


@pytest.mark.parametrize("loss, perplexity", [(2.0, math.exp(2.0)), (1000.0, None), (math.nan, None)])
def test_json_stays_json(sound, monkeypatch, capsys, loss, perplexity):
    monkeypatch.setattr(step, "evaluate", lambda *arguments: {"loss": loss, "tokens": 7})
    argv = ["--model", sound / "model", "--data", sound / "rows.jsonl", "--json"]
    assert exit_code(evaluate.main, argv) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"loss": loss if math.isfinite(loss) else None, "perplexity": perplexity, "tokens": 7}
