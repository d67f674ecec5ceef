"""Chat templates from elsewhere harm nobody: they are rendered in a process that can be ended."""

from pathlib import Path

import pytest

from qlora_jax.data import load_tokenizer
from qlora_jax.data.isolated import Isolated
from qlora_jax.data.prompt import chat_text

DEMO = Path(__file__).parents[2] / "demo" / "base"
HI = [{"role": "user", "content": "Hi"}]
OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{{ mood }}"
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# No step of these two can be interrupted from within: only the process can be ended.
HARM = {
    "loops": (LONG, "takes more than 1 seconds"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "takes more than 1 seconds"),
    "memory": ("{{ messages[0].content * 9999999999 }}", "MemoryError"),
    "text": ("{{ messages[0].content * 9999999 }}", "writes 19,999,998 characters"),
    "no Jinja": ("{% for %}", "no valid Jinja"),
    "what is unsafe": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "what it leaves out": ("{{ messages | length }}", "leaves out"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(DEMO))


@pytest.fixture(scope="module")
def isolated(tokenizer):
    isolated = Isolated(tokenizer, seconds=60)
    yield isolated
    isolated.close()


def test_chats_are_rendered_as_in_this_process(isolated, tokenizer):
    options = {"mood": "glad"}
    expected = chat_text(HI, tokenizer, options=options, chat_template=OWN)
    assert expected == f"<user>Hi{tokenizer.eos_token}glad"
    for template in (OWN, {"default": OWN}):
        assert isolated.text(template, HI, options=options) == expected


@pytest.mark.parametrize("what", HARM)
def test_what_a_template_does_is_its_own_harm(isolated, monkeypatch, what):
    template, words = HARM[what]
    monkeypatch.setattr(isolated, "_seconds", 1 if "seconds" in words else 60)
    with pytest.raises(ValueError, match=words):
        isolated.text(template, HI)
    monkeypatch.setattr(isolated, "_seconds", 60)
    assert isolated.text(OWN, HI) == chat_text(HI, isolated._tokenizer, chat_template=OWN)


def test_one_that_took_too_long_is_not_tried_again(isolated, monkeypatch):
    monkeypatch.setattr(isolated, "_seconds", 1)
    with pytest.raises(ValueError, match="takes more than 1 seconds"):
        isolated.text(LONG + " ", HI)
    monkeypatch.setattr(isolated, "_start", None)
    with pytest.raises(ValueError, match="takes more than 1 seconds"):
        isolated.text(LONG + " ", HI)


def test_a_process_that_was_ended_from_outside_is_started_again(isolated):
    isolated.text(OWN, HI)
    isolated._process.kill()
    isolated._process.join()
    assert isolated.text(OWN, HI)
