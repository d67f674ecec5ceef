"""The chat templates that trl carries, the real ones of many models, and conversations to render with them."""

import importlib.util
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
# Those with {% generation %} blocks, whose mask transformers can give.
WITH_BLOCKS = [name for name, text in TEMPLATES.items() if re.search(r"\{%-?\s*generation\s*-?%\}", text)]
SPECIAL = re.compile(r"<\|[\w:]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<\|?turn\|?>|<\|?channel\|?>")
SPECIALS = sorted({token for text in TEMPLATES.values() for token in SPECIAL.findall(text)} | {"<bos>", "<eos>"})

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}},
    },
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(town):
    return {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"town": town}}}


RESULT = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "abcdef123"}
SYSTEM = {"role": "system", "content": "be brief"}
Q1, Q2, A1, A2 = user("question one"), user("question two"), assistant("answer one"), assistant("answer two")
THOUGHT1 = assistant("<think>\nthought one\n</think>\n\nanswer one")
THOUGHT2 = assistant("<think>\nthought two\n</think>\n\nanswer two")
# name → (messages, tools)
CHATS = {
    "one question": ([Q1, A1], None),
    "two questions": ([Q1, A1, Q2, A2], None),
    "a system message": ([SYSTEM, Q1, A1, Q2, A2], None),
    "two answers in a row": ([Q1, A1, assistant("answer more"), Q2, A2], None),
    "the user last": ([Q1, A1, Q2], None),
    "thoughts": ([Q1, THOUGHT1, Q2, THOUGHT2], None),
    "a call": ([Q1, assistant("", tool_calls=[call("Ulm")]), RESULT, A1], [TOOL]),
    "a call, and on": ([Q1, assistant("let me see", tool_calls=[call("Ulm")]), RESULT, A1, Q2, A2], [TOOL]),
    "two calls at once": ([Q1, assistant("", tool_calls=[call("Ulm"), call("Bonn")]), RESULT, RESULT, A1], [TOOL]),
}


def build(template):
    """A tokenizer of bytes, so that masks are told apart to the character, with every template's special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer
