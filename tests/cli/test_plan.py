"""`scripts/plan.py`, and what training says of a GPU that is too small."""

import json
import re
from types import SimpleNamespace

import jax
import pytest

from qlora_jax.cli import main as command_line
from qlora_jax.cli.plan import main as plan
from qlora_jax.cli.train import main as train
from qlora_jax.config import load_config
from qlora_jax.io.hf import read_config
from qlora_jax.memory.compile import CompilerMissing
from qlora_jax.report.progress import Terminal
from qlora_jax.run import out_of_memory
from qlora_jax.run import plan as planning
from qlora_jax.training.loop import Loop
from tests.cli.commands import command, exit_code

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234 bytes."


def arguments(sound, gpu: str, *more: str) -> list[str]:
    return ["--config", str(sound / "config.py"), "--gpu", gpu, *more]


@pytest.fixture
def no_compiler(monkeypatch):
    """No CUDA plugin is installed."""

    def missing(*arguments):
        raise CompilerMissing("needs the plugin: pip install 'qlora-jax[plan]'")

    monkeypatch.setattr(planning, "compile_for", missing)


@pytest.fixture
def peak_of(monkeypatch):
    """`peak_of(n)`: the compiler states n bytes. Returns what was compiled for which card."""
    asked = []

    def state(peak: int) -> list[str]:
        monkeypatch.setattr(planning, "compile_for", lambda step, arguments, gpu: asked.append(gpu))
        monkeypatch.setattr(planning, "device_bytes", lambda compiled: {"peak": peak})
        return asked

    return state


def planned(capsys, argv) -> dict:
    """The one JSON object on standard output."""
    capsys.readouterr()
    assert exit_code(plan, [*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- the report


def test_json_by_arithmetic_alone(sound, no_compiler, capsys):
    assert exit_code(plan, arguments(sound, "rtx4090", "--json")) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["gpu"] == "rtx4090" and report["method"] == "qlora"
    assert report["compiled"] is False and report["compiled_as"] is None
    assert report["peak_bytes"] == report["arithmetic_peak_bytes"] == sum(report["breakdown"].values()) > 0
    assert (report["capacity_bytes"], report["context_bytes"]) == (25_300_000_000, 700_000_000)
    assert report["fits"] is True and report["longest_sequence"] == 128  # the model's positions
    assert report["largest_batch"] > 1000
    assert list(report["methods"]) == ["full", "lora", "qlora"]
    assert report["methods"]["full"]["breakdown"]["adapters"] == 0 < report["breakdown"]["adapters"]
    # Nothing is silent about why.
    assert report["how"] in printed.err and "pip install 'qlora-jax[plan]'" in report["how"]


def test_json_with_the_compilers_peak(sound, peak_of, capsys):
    asked = peak_of(10_000_000)
    report = planned(capsys, arguments(sound, "48GB"))
    assert asked == ["l40s"] == [report["compiled_as"]]
    assert report["compiled"] is True and report["peak_bytes"] == 10_000_000 != report["arithmetic_peak_bytes"]
    assert report["how"] == "compiled by XLA for NVIDIA L40S (standing in for 48GB)"
    assert report["capacity_bytes"] == 48_000_000_000


def test_the_context_and_the_peak_decide_what_fits(sound, peak_of, capsys):
    """At the border: two rows fit exactly, and one byte more is too much."""
    peak_of(300_000_000)
    report = planned(capsys, arguments(sound, "1GB"))
    assert report["fits"] is True and (report["largest_batch"], report["longest_sequence"]) == (2, 32)
    peak_of(300_000_001)
    report = planned(capsys, arguments(sound, "1GB"))
    assert report["fits"] is False and (report["largest_batch"], report["longest_sequence"]) == (1, 0)
    first = report["changes"][0]
    assert first["overrides"] == ["--config.train.batch_size=1", "--config.train.grad_accum=4"]
    assert first["fits"] and first["fits_with_those_before"] and first["saves_bytes"] > 0


def test_what_xla_cannot_compile_is_planned_by_arithmetic_and_marked(sound, monkeypatch, capsys):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such architecture\nmore")

    monkeypatch.setattr(planning, "compile_for", fail)
    report = planned(capsys, arguments(sound, "b200"))
    assert report["compiled"] is False
    assert report["how"].endswith("XLA does not compile it for NVIDIA B200: INTERNAL: no such architecture")


def test_the_table_fits_a_terminal_and_says_all(sound, peak_of, capsys):
    peak_of(300_000_001)
    assert exit_code(plan, arguments(sound, "1GB")) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for words in (
        "full +LoRA +QLoRA \\(chosen\\)",
        "packed weights: codes +- +- +[\\d.]+ MB",
        "peak by arithmetic( +[\\d.]+ MB){3}",
        "peak by XLA's compiler +0.30 GB",
        "Does not fit: 1.00 GB of 1.00 GB, 0.0 MB too much",
        "Largest batch that fits: 1 at 32 tokens",
        "Longest sequence that fits: none at batch 2",
        "change first +saves alone +with those above",
        "--config.train.batch_size=1 --config.train.grad_accum=4 +[\\d.]+ MB +[\\d.]+ GB, fits",
    ):
        assert re.search(words, out), f"{words}\n{out}"


def test_the_command_is_a_part_of_qlora_jax(sound, no_compiler, capsys):
    assert command_line.main(["plan", *arguments(sound, "t4", "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == "t4"


# --- bad input


@pytest.mark.parametrize(
    ("gpu", "words"),
    [("rtx9999", ["unknown GPU 'rtx9999'", "rtx3060, rtx3090", "b200", "48GB"]), ("48", ["did you mean 48GB?"])],
)
def test_unknown_gpu(gpu, words, sound, fails):
    fails(plan, arguments(sound, gpu), *words, code=2)


def test_missing_gpu(sound, capsys):
    assert exit_code(plan, ["--config", sound / "config.py"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_wrong_field(sound, fails):
    fails(plan, arguments(sound, "t4", "--config.lora.rnk=4"), "did you mean config.lora.rank?", code=2)


def test_geometry_that_is_not_here(sound, fails):
    words = ["'someone/model' is no local folder", "--config.model.geometry=FILE", "--config.model.path=DIR"]
    fails(plan, arguments(sound, "t4", "--config.model.path=someone/model"), *words)


def test_geometry_without_a_model(sound, no_compiler, capsys):
    """A config.json is enough: offline, nothing is downloaded."""
    file = sound / "model" / "config.json"
    more = ["--config.model.path=someone/model", f"--config.model.geometry={file}"]
    assert planned(capsys, arguments(sound, "t4", *more)) == planned(capsys, arguments(sound, "t4"))


def test_sequence_longer_than_the_model(sound, fails):
    fails(plan, arguments(sound, "t4", "--config.train.seq_len=129"), "128 positions", "model.max_position=129")


def test_kernels_that_the_card_does_not_have(sound, fails, monkeypatch):
    """No arithmetic in place of an error that the run would meet, too."""

    def refuse(*arguments):
        raise RuntimeError("kernels='pallas' cannot run: compute capability 7.5 is below 8.0")

    monkeypatch.setattr(planning, "compile_for", refuse)
    fails(plan, arguments(sound, "t4"), "kernels='pallas' cannot run")


# --- training


@pytest.fixture
def exhausted_step(monkeypatch):
    """The third step finds no memory left."""
    original = Loop._one_step

    def step(loop, index, *arguments):
        if index == 2:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        original(loop, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_one_step", step)
        yield patch


def test_running_out_of_memory_is_one_clear_error_and_loses_nothing(sound, tmp_path, exhausted_step, capsys):
    run = tmp_path / "run"
    exhausted_step.setattr(out_of_memory, "device_memory", lambda: 100_000)
    capsys.readouterr()
    assert exit_code(train, command(sound, run)) == 1
    err = capsys.readouterr().err
    [warning] = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "JAX may use 0.1 MB of this GPU; next: add --config.train.batch_size=1" in warning
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith(line + "\n") and "Traceback" not in err
    for words in (
        "out of memory on the device",
        "of the 0.1 MB that JAX may use",
        "most of it for largest temporary ",
        "next: add --config.train.batch_size=1 --config.train.grad_accum=4 (saves ",
        "and a new --config.output_dir",
        "no checkpoint is lost",
    ):
        assert words in line, line
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == ["1", "2"]
    exhausted_step.undo()
    assert exit_code(train, command(sound, run)) == 0
    assert "continuing from the checkpoint of step 2" in capsys.readouterr().err


def test_other_errors_of_the_runtime_keep_their_words(sound):
    config, geometry = sound_config(sound)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"),
        out_of_memory.explains_out_of_memory(config, geometry),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_a_change_that_the_run_may_go_on_with_is_said_to_go_on(sound, tmp_path):
    config, geometry = sound_config(sound, "train.batch_size=1", "train.remat=none", f"output_dir={sound / 'run'}")
    with (
        pytest.raises(out_of_memory.OutOfMemory, match=r"add --config.train.remat=full .*, which goes on in the same"),
        out_of_memory.explains_out_of_memory(config, geometry),
    ):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)


@pytest.mark.parametrize("limit", [None, 10**12])
def test_nothing_is_said_without_a_gpu_or_where_it_fits(limit, sound, monkeypatch, capsys):
    monkeypatch.setattr(out_of_memory, "device_memory", lambda: limit)
    out_of_memory.warn_if_too_large(*sound_config(sound), Terminal())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("platform", "stats", "expected"),
    [("gpu", {"bytes_limit": 5}, 5), ("gpu", None, None), ("cpu", {"bytes_limit": 5}, None)],
)
def test_memory_is_asked_of_gpus_only(platform, stats, expected, monkeypatch):
    device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert out_of_memory.device_memory() == expected


def sound_config(sound, *overrides: str):
    config = load_config(sound / "config.py", [f"--config.{override}" for override in overrides])
    return config, read_config(sound / "model")
