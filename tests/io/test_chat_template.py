"""Chat templates in every layout of folders that transformers writes, read and written as transformers reads them."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from qlora_jax.io import chat_template as module
from qlora_jax.io.chat_template import read_chat_template, write_chat_template
from tests.cli.tiny import write_tokenizer

ONE = "{% for m in messages %}é {{ m['content'] }}\n{% endfor %}"
SEVERAL = {"default": ONE, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


def saved(folder, templates, *, jinja: bool):
    """A tokenizer's folder with these templates, as transformers saves it now, or as versions before 5 did."""
    folder.mkdir()
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder, save_jinja_files=jinja)
    return folder


def as_transformers_reads(folder):
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("jinja", [True, False])
@pytest.mark.parametrize("templates", [None, ONE, SEVERAL, {"default": ONE}])
def test_read_as_transformers_reads(tmp_path, templates, jinja):
    folder = saved(tmp_path / "a", templates, jinja=jinja)
    assert read_chat_template(folder) == as_transformers_reads(folder)
    assert templates is None or "é" in str(read_chat_template(folder))


@pytest.mark.parametrize("jinja", [True, False])
@pytest.mark.parametrize("before", [None, "old", {"default": "old", "rag": "old"}])
@pytest.mark.parametrize("now", [ONE, SEVERAL])
def test_what_is_written_takes_the_place_of_all_that_was_there(tmp_path, before, now, jinja):
    folder = saved(tmp_path / "a", before, jinja=jinja)
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')  # a processor's
    write_chat_template(folder, now)
    assert read_chat_template(folder) == as_transformers_reads(folder) == now
    (folder / "chat_template.jinja").write_bytes(ONE.replace("\n", "\r\n").encode())
    assert read_chat_template(folder) == as_transformers_reads(folder) == now
    shutil.rmtree(tmp_path / "a" / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.jinja").unlink()
    assert "old" not in "".join(file.read_text() for file in folder.iterdir())


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is no UTF-8 text"):
        read_chat_template(folder)
    monkeypatch.setattr(module, "MOST_BYTES", 3)
    (folder / "chat_template.jinja").write_text("long")
    with pytest.raises(ValueError, match=r"chat_template\.jinja has 4 bytes, more than the 3"):
        read_chat_template(folder)
    monkeypatch.undo()
    (folder / "chat_template.jinja").unlink()
    for damaged in ("[", "[]", '{"chat_template": [{}]}'):
        (folder / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
            read_chat_template(folder)


def test_links_that_lead_out_of_the_root(tmp_path):
    (tmp_path / "secret.jinja").write_text("secret")
    (tmp_path / "a" / "additional_chat_templates").mkdir(parents=True)
    for place in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer_config.json"):
        link = tmp_path / "a" / place
        link.symlink_to(tmp_path / "secret.jinja")
        with pytest.raises(ValueError, match="link that leads out"):
            read_chat_template(tmp_path / "a", root=tmp_path / "a")
        link.unlink()


def test_a_folder_without_templates(tmp_path):
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert read_chat_template(tmp_path) is None
