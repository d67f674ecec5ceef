"""The chat template that a run was trained with goes wherever its result goes, and is what chats are rendered with."""

import dataclasses
import json
import shutil

import pytest
from transformers import AutoTokenizer

from qlora_jax.cli.export import main as export
from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.train import main as train
from qlora_jax.data import load_chat_template
from qlora_jax.io.chat_template import read_chat_template
from qlora_jax.io.peft import read_adapter
from qlora_jax.run.load import open_tokenizer
from tests.cli.commands import command, exit_code

CHATML = load_chat_template("chatml")
OTHER = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = ("train.steps=1", "train.eval_every=0", "train.save_every=1", "data.samples=0", "data.eval=")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]} for i in range(4)
    ]
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(sound, chats, tmp_path_factory):
    """A run with a template that the base's tokenizer does not have, from a file that is gone since."""
    folder = tmp_path_factory.mktemp("trained")
    template = folder / "template.jinja"
    template.write_text(OTHER)
    changes = (f"data.train={chats}", f"data.chat_template={template}", "train.seq_len=64", *SHORT)
    assert exit_code(train, command(sound, folder / "run", *changes)) == 0
    template.unlink()
    return folder / "run"


@pytest.mark.parametrize("more", [[], ["--step", "1"]], ids=["final", "checkpoint"])
@pytest.mark.parametrize("form", ["peft", "merged", "bnb4"])
def test_every_exported_folder_has_it(trained, tmp_path, form, more):
    assert exit_code(export, ["--run", trained, "--out", tmp_path / "out", "--format", form, *more]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OTHER
    if form != "peft":
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == OTHER


def test_a_full_fine_tune_has_it(sound, chats, tmp_path):
    changes = (f"data.train={chats}", "data.chat_template=chatml", "method=full", "train.seq_len=64", *SHORT)
    assert exit_code(train, command(sound, tmp_path / "run", *changes)) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == CHATML


def test_the_tokenizers_own_goes_with_the_adapter_too(sound, chats, model, tmp_path):
    """A base may change its template after the adapter was trained."""
    (model / "chat_template.jinja").write_text(OTHER)
    changes = (f"model.path={model}", f"data.train={chats}", "train.seq_len=64", *SHORT)
    assert exit_code(train, command(sound, tmp_path / "run", *changes)) == 0
    assert read_chat_template(tmp_path / "run" / "adapter") == OTHER


def test_without_a_template_none_is_written(run):
    assert not list(run.rglob("chat_template*"))


def test_which_template_holds(trained, model, tmp_path):
    """The chosen one before the adapter's, the adapter's before the model's."""
    adapter = read_adapter(trained / "adapter")
    bare = dataclasses.replace(adapter, chat_template=None)
    (model / "chat_template.jinja").write_text("the model's")
    (tmp_path / "mine.jinja").write_text("mine")
    for chosen, given, expected in (
        (None, None, "the model's"),
        (None, bare, "the model's"),
        (None, adapter, OTHER),
        ("chatml", adapter, CHATML),
        (str(tmp_path / "mine.jinja"), adapter, "mine"),
        ("chatml", None, CHATML),
    ):
        assert open_tokenizer(model, chosen=chosen, adapter=given).chat_template == expected
    with pytest.raises(FileNotFoundError, match=r"--chat-template 'chatlm' is neither a file nor a built-in"):
        open_tokenizer(model, chosen="chatlm")


def test_generate_renders_the_prompt_with_it(sound, trained, capsys):
    """As raw text the rendered prompt gives the same tokens; greedy in fp32, so any other prompt would not."""

    def tokens(*arguments) -> list[int]:
        capsys.readouterr()
        argv = ["--model", sound / "model", "--dtype", "fp32", "--max-new-tokens", 8, "--json", *arguments]
        assert exit_code(generate, argv) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    adapted = ["--adapter", trained / "adapter"]
    rendered = tokens(*adapted, "--prompt", "<user>hello<assistant>")
    assert tokens(*adapted, "--chat", "--prompt", "hello") == rendered
    chatml = tokens("--prompt", "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert tokens("--chat-template", "chatml", "--prompt", "hello") == chatml != rendered


def test_a_run_of_an_earlier_version_names_a_file(trained, chats, tmp_path):
    """Its folders have no template: the one that its configuration names is taken."""
    run = shutil.copytree(trained, tmp_path / "run")
    for file in run.rglob("chat_template.jinja"):
        file.unlink()
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["chat_template"] = "chatml"
    (run / "config.json").write_text(json.dumps(settings))
    assert exit_code(export, ["--run", run, "--out", tmp_path / "out", "--format", "merged"]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
