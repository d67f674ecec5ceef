"""Loading, writing texts, measuring and exporting as functions: they give what the commands print."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import qlora_jax
from qlora_jax.cli.evaluate import main as evaluate_command
from qlora_jax.cli.generate import main as generate_command
from qlora_jax.generation import decode
from qlora_jax.run.compare import compare
from qlora_jax.run.generate import continuations
from qlora_jax.run.load import ModelSource
from qlora_jax.run.serve import Listening, serve
from qlora_jax.run.text_model import Writing
from qlora_jax.serve import EngineOptions

ROOT = Path(__file__).parents[2]
PROMPTS = ["say 3:", "say 1:", "something much longer than the others say 5:"]


@pytest.fixture(scope="module")
def model(folder, trained):
    return qlora_jax.load(folder / "model", trained.adapter, quant="nf4", dtype="fp32")


def printed(capsys, command, *arguments) -> dict:
    capsys.readouterr()
    assert command([str(one) for one in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def named(folder, trained) -> list:
    return ["--model", folder / "model", "--adapter", trained.adapter, "--quant", "nf4", "--dtype", "fp32"]


def test_one_prompt_gives_a_text_and_several_give_texts(model, folder, trained, capsys):
    one = model.generate(PROMPTS[0], max_new_tokens=6)
    assert isinstance(one, str)
    assert model.generate(PROMPTS, max_new_tokens=6) == [model.generate(p, max_new_tokens=6) for p in PROMPTS]
    told = printed(capsys, generate_command, *named(folder, trained), "--prompt", PROMPTS[0], "--max-new-tokens", "6")
    assert told["text"] == one
    source = ModelSource(path=folder / "model", adapter=trained.adapter, quant="nf4", dtype="fp32")
    [found] = continuations(source, [PROMPTS[0]], Writing(max_new_tokens=6))
    assert (found.text, found.tokens) == (told["text"], told["tokens"])
    assert qlora_jax.generate(source, PROMPTS[0], max_new_tokens=6) == one


def test_the_same_seed_draws_the_same(model):
    drawn = [model.generate(PROMPTS, max_new_tokens=12, temperature=1.5, top_k=50, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_second_call_compiles_nothing(model):
    model.generate("abc", max_new_tokens=5)
    before = decode._generate._cache_size()
    model.generate("something else", max_new_tokens=5, seed=3)
    assert decode._generate._cache_size() == before


def test_chat_needs_a_template(model, folder):
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template: give one"):
        model.generate("hello", chat=True)
    chat = qlora_jax.load(folder / "model", chat_template="chatml", dtype="fp32")
    assert isinstance(chat.generate("hi", chat=True, max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 200}, "exceed the model's 128 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_what_cannot_be_written(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate("abc", **options)


def test_figures_are_those_of_the_command(model, folder, trained, capsys):
    rows = str(folder / "rows.jsonl")
    found = qlora_jax.evaluate(model, rows, exact_match=True)
    told = printed(capsys, evaluate_command, *named(folder, trained), "--data", rows, "--exact-match")
    assert found.figures() == told and set(told) == {"loss", "perplexity", "tokens", "exact_match"}
    assert qlora_jax.evaluate(model, rows).exact_match is None


def test_what_is_exported_is_loaded(model, folder, trained, tmp_path):
    out = qlora_jax.export(trained.folder, tmp_path / "merged", merge_into="dequantized", dtype="fp32")
    assert out == tmp_path / "merged"
    merged = qlora_jax.load(out, dtype="fp32")
    assert merged.generate(PROMPTS[0], max_new_tokens=6) == model.generate(PROMPTS[0], max_new_tokens=6)
    first = qlora_jax.export(trained.folder, tmp_path / "first", format="peft", step=1)
    assert (first / "adapter_config.json").exists()


def test_a_plan(make_config, tmp_path):
    found = qlora_jax.plan(make_config(tmp_path), "48GB")
    assert found.fits(found.peak) and found.breakdown.peak > 100_000
    with pytest.raises(ValueError, match="unknown GPU 'gtx9999'"):
        qlora_jax.plan(make_config(tmp_path), "gtx9999")


def test_unknown_words(folder, trained, make_config, tmp_path):
    with pytest.raises(ValueError, match="dtype='float8': expected one of bf16, "):
        qlora_jax.load(folder / "model", dtype="float8")
    with pytest.raises(ValueError, match="quant='int3': expected one of auto, none, nf4"):
        qlora_jax.load(folder / "model", quant="int3")
    with pytest.raises(ValueError, match="format='gguf': expected one of peft, merged, bnb4"):
        qlora_jax.export(trained.folder, tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="merge_into='both': expected one of original, dequantized"):
        qlora_jax.export(trained.folder, tmp_path / "out", merge_into="both")
    with pytest.raises(ValueError, match="mode='slow': expected one of quick, default, ablations"):
        compare(make_config(tmp_path), tmp_path / "out", mode="slow")
    with pytest.raises(ValueError, match="dtype='float8': expected one of bf16, "):
        EngineOptions(dtype="float8")
    assert not (tmp_path / "out").exists()


def test_a_server_in_a_thread(folder, caplog):
    caplog.set_level("INFO", "qlora_jax")
    end, failed = threading.Event(), []
    options = EngineOptions(quant="nf4", dtype="fp32", slots=1, max_loras=1, max_rank=4, max_length=32)

    def run():
        try:
            serve(folder / "model", engine=options, listening=Listening(port=0, drain=1), until=end)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        address = None
        while address is None and thread.is_alive():
            thread.join(0.1)
            address = next((m.split(" on ")[1] for m in caplog.messages if m.startswith("serving model on")), None)
        answer = httpx.post(
            f"{address}/v1/completions", json={"model": "model", "prompt": "ab", "max_tokens": 2}, timeout=60
        )
        assert answer.status_code == 200, answer.text
    finally:
        end.set()
        thread.join()
    assert failed == []


def test_the_package_imports_what_runs_only_when_asked():
    code = (
        "import sys, qlora_jax\n"
        "late = {'transformers', 'tokenizers', 'orbax.checkpoint', 'qlora_jax.run'} & set(sys.modules)\n"
        "assert not late, late\n"
        "assert 'torch' not in sys.modules and 'fastapi' not in sys.modules\n"
        "assert {'train', 'load', 'generate', 'Config', 'load_config'} <= set(dir(qlora_jax)), dir(qlora_jax)\n"
        "assert all(callable(getattr(qlora_jax, name)) for name in qlora_jax.__all__)\n"
        "assert qlora_jax.train is qlora_jax.train\n"
        "print(hasattr(qlora_jax, 'trian'))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("False\n", "")
