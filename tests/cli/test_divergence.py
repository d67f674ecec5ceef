"""A figure that is no number ends the run: it is never logged, saved or taken for the best."""

import math

import pytest

from qlora_jax.cli.export import main as export
from qlora_jax.cli.train import main as train
from qlora_jax.training import loop
from qlora_jax.training.loop import Loop
from tests.cli.commands import command, exit_code
from tests.cli.test_resume import rows, saved

# Every step is evaluated and saved, and only the last and the best are kept.
EVERY = ("train.steps=5", "train.eval_every=1", "train.keep=1", "data.samples=0")


def breaks(monkeypatch, figure: str, value: float, at: int) -> None:
    """Puts `value` in the figure's place in step `at`; for eval_loss 0 is the untrained model's."""
    calls = iter(range(100))
    if figure == "eval_loss":
        whole = loop.evaluate
        monkeypatch.setattr(
            loop, "evaluate", lambda *a: {"loss": value, "tokens": 1} if next(calls) == at else whole(*a)
        )
        return
    compile_step = Loop._compile

    def compiled(self, progress):
        step = compile_step(self, progress)

        def broken(*arguments):
            adapters, state, metrics = step(*arguments)
            bad = next(calls) + 1 == at
            return adapters, state, {k: v * 0 + value if bad and k == figure else v for k, v in metrics.items()}

        return broken

    monkeypatch.setattr(Loop, "_compile", compiled)


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_a_step(sound, tmp_path, monkeypatch, capsys, figure, evaluated):
    breaks(monkeypatch, figure, math.nan, 3)
    more = () if evaluated else ("data.eval=",)
    assert exit_code(train, command(sound, tmp_path / "run", *EVERY, *more)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: step 3: ") and f"{figure} nan" in line and "last checkpoint is of step 2" in line
    assert max(saved(tmp_path / "run")) == 2
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation(sound, tmp_path, monkeypatch, capsys, value):
    """The best checkpoint stays, and is what --step best means."""
    run = tmp_path / "run"
    breaks(monkeypatch, "eval_loss", value, 3)
    assert exit_code(train, command(sound, run, *EVERY)) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"error: step 3: eval_loss {value}: training has diverged")
    )
    losses = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row}
    assert sorted(losses) == [0, 1, 2]
    best = min((1, 2), key=losses.get)
    assert saved(run) == sorted({best, 2})
    assert exit_code(export, ["--run", run, "--out", tmp_path / "best", "--format", "peft", "--step", "best"]) == 0


def test_the_untrained_model(sound, tmp_path, monkeypatch, capsys):
    breaks(monkeypatch, "eval_loss", math.nan, 0)
    assert exit_code(train, command(sound, tmp_path / "run", *EVERY)) == 1
    assert "step 0: eval_loss nan: the untrained model has diverged" in capsys.readouterr().err
    assert saved(tmp_path / "run") == []
