"""Real chat templates: what we render and learn, against transformers' own text and assistant mask."""

import itertools

import numpy as np
import pytest

from qlora_jax.data import Row, encode, to_example
from qlora_jax.data.prompt import chat_ids
from tests.data.real_templates import CHATS, TEMPLATES, WITH_BLOCKS, assistant, build, user

# These write content only where it is a list of parts; transformers drops text that is given as text.
PARTS_ONLY = {"idefics3", "smolvlm", "llava_next"}


def example_of(messages, tools=None):
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    return to_example(Row(values=row, origin="row"), alpaca_as_chat=True)


def encoded_or_none(example, tokenizer):
    """None where the row is refused, which a template that knows no tools, say, is bound to do."""
    try:
        return encode(example, tokenizer, seq_len=10_000)
    except ValueError as error:
        assert str(error).startswith("the chat template ")
        return None


def learned(encoded, tokenizer):
    """The learned runs as text."""
    pairs = zip(encoded.ids.tolist(), encoded.scored.tolist(), strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for scored, run in runs if scored]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_own(name):
    tokenizer, compared = build(TEMPLATES[name]), 0
    for messages, tools in CHATS.values():
        example = example_of(messages, tools)
        encoded = encoded_or_none(example, tokenizer)
        if encoded is None:
            continue
        given = list(example.messages)
        if name.removesuffix("_training") in PARTS_ONLY:
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in given]
        expected = tokenizer.apply_chat_template(given, tools=example.tools, tokenize=False)
        assert tokenizer.decode(encoded.ids).removesuffix("<eos>") == expected.removesuffix("<eos>")
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_mask_is_transformers_own(name):
    tokenizer = build(TEMPLATES[name])
    for messages, tools in CHATS.values():
        example = example_of(messages, tools)
        encoded = encoded_or_none(example, tokenizer)
        if encoded is None or name.removesuffix("_training") in PARTS_ONLY:
            continue
        expected = tokenizer.apply_chat_template(
            list(example.messages), tools=example.tools, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        # An eos that the template leaves out is appended and learned.
        assert encoded.scored.tolist()[: len(expected)] == [bool(yes) for yes in expected]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if f"{name}_training" in TEMPLATES])
def test_without_blocks_what_is_learned_is_what_blocks_would_say(name):
    """The same model's template with blocks is the judge where both write the same text: nothing beyond them is
    learned, and of what they hold all but white space and openings, which generation is given."""
    stock, judge = build(TEMPLATES[name]), build(TEMPLATES[f"{name}_training"])
    for messages, tools in CHATS.values():
        example = example_of(messages, tools)
        ours, theirs = encoded_or_none(example, stock), encoded_or_none(example, judge)
        if ours is None or theirs is None or ours.ids.tolist() != theirs.ids.tolist():
            continue
        only_ours = stock.decode(ours.ids[ours.scored & ~theirs.scored])
        only_theirs = stock.decode(ours.ids[theirs.scored & ~ours.scored])
        assert only_ours.strip() == ""
        assert not [words for words in ("answer", "weather", "<|im_end|>", "<|eot_id|>") if words in only_theirs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_asked_is_never_learned_and_what_is_answered_is(name):
    tokenizer = build(TEMPLATES[name])
    for messages, tools in CHATS.values():
        encoded = encoded_or_none(example_of(messages, tools), tokenizer)
        if encoded is None:
            continue
        said = "".join(learned(encoded, tokenizer))
        assert not [words for words in ("question", "rain", "be brief", "its name") if words in said]
        assert all(m["content"].split("</think>")[-1].strip() in said for m in messages if m["role"] == "assistant")


QWEN3 = {
    "one question": ["<think>\n\n</think>\n\nanswer one<|im_end|>\n<eos>"],
    "two questions": ["answer one<|im_end|>", "<think>\n\n</think>\n\nanswer two<|im_end|>\n<eos>"],
    "two answers in a row": [
        "answer one<|im_end|>",
        "answer more<|im_end|>",
        "<think>\n\n</think>\n\nanswer two<|im_end|>\n<eos>",
    ],
    "the user last": ["answer one<|im_end|>"],
    "thoughts": ["answer one<|im_end|>", "<think>\nthought two\n</think>\n\nanswer two<|im_end|>\n<eos>"],
    "a call": [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nanswer one<|im_end|>\n<eos>",
    ],
}


@pytest.mark.parametrize("chat", QWEN3)
def test_a_reasoning_template_learns_what_generation_would_have_to_produce(chat):
    tokenizer = build(TEMPLATES["qwen3"])
    assert learned(encode(example_of(*CHATS[chat]), tokenizer, seq_len=10_000), tokenizer) == QWEN3[chat]


def test_the_tools_result_inside_a_turn_is_not_learned():
    tokenizer = build(TEMPLATES["gemma4_v5"])
    runs = learned(encode(example_of(*CHATS["a call"]), tokenizer, seq_len=10_000), tokenizer)
    assert runs == ['<|tool_call>call:weather{town:<|"|>Ulm<|"|>}<tool_call|>', "answer one<turn|>\n<eos>"]


def test_llama_writes_the_first_question_outside_its_loop():
    tokenizer = build(TEMPLATES["llama3_1"])
    runs = learned(encode(example_of(*CHATS["a call"]), tokenizer, seq_len=10_000), tokenizer)
    assert runs == ['{"name": "weather", "parameters": {"town": "Ulm"}}<|eot_id|>', "answer one<|eot_id|><eos>"]


@pytest.mark.parametrize(
    ("name", "chat", "left_out"),
    [
        ("llama3", "a call", "tools[0]; a tool call of messages[1]; an argument of a tool call of messages[1]"),
        ("llama3_1", "a call, and on", "the content of messages[1] (assistant)"),
        ("deepseek_r1_distill", "thoughts", "the thought of messages[3]"),
        ("lfm2", "a call", "a tool call of messages[1]; an argument of a tool call of messages[1]"),
    ],
)
def test_a_row_is_refused_whose_words_the_template_drops(name, chat, left_out):
    with pytest.raises(ValueError) as error:
        encode(example_of(*CHATS[chat]), build(TEMPLATES[name]), seq_len=10_000)
    assert str(error.value).startswith(f"the chat template leaves out {left_out}")


def test_a_developer_is_the_system_where_the_template_knows_no_developer():
    messages = [{"role": "developer", "content": "be brief"}, user("question one"), assistant("answer one")]
    for name, opening in (("llama3", "system"), ("gptoss", "developer")):
        tokenizer = build(TEMPLATES[name])
        text = tokenizer.decode(encode(example_of(messages), tokenizer, seq_len=10_000).ids)
        assert "be brief" in text
        assert (f"<|start|>{opening}" in text) or (f"<|start_header_id|>{opening}<|end_header_id|>" in text)


def test_options_of_a_row_reach_the_template():
    tokenizer = build(TEMPLATES["qwen3"])
    row = {
        "messages": [user("question one"), assistant("answer one")],
        "chat_template_kwargs": '{"enable_thinking": false}',
    }
    example = to_example(Row(values=row, origin="row"), alpaca_as_chat=True)
    # The prompt has the empty thought then, so that only the answer is left to produce.
    assert learned(encode(example, tokenizer, seq_len=10_000), tokenizer) == ["answer one<|im_end|>\n<eos>"]


def test_masks_are_linear_in_the_number_of_turns(monkeypatch):
    """Counted in characters that are rendered, which no busy machine changes."""
    from qlora_jax.data.chat import marks

    rendered = []
    parts = marks._parts
    monkeypatch.setattr(marks, "_parts", lambda text, count: rendered.append(len(text)) or parts(text, count))
    lengths = []
    for turns in (20, 80):
        rendered.clear()
        example = example_of([user("question"), assistant("answer")] * turns)
        tokenizer = build(TEMPLATES["qwen3"])
        lengths.append(sum(rendered) if encode(example, tokenizer, seq_len=10**6) else 0)
        lengths[-1] = sum(rendered)
    assert lengths[1] < 5 * lengths[0]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in WITH_BLOCKS])
def test_what_precedes_the_last_answer_is_what_generation_is_given(name):
    """But for the thought that some templates open in the prompt and leave out of what was said."""
    tokenizer = build(TEMPLATES[name])
    for messages, tools in CHATS.values():
        encoded = encoded_or_none(example_of(messages, tools), tokenizer)
        if encoded is None or messages[-1]["role"] != "assistant":
            continue
        asked = tokenizer.decode(chat_ids(messages[:-1], tokenizer, tools=tools))
        last = np.flatnonzero(encoded.scored & ~np.roll(encoded.scored, 1))[-1]
        given = tokenizer.decode(encoded.ids[:last])
        longer, shorter = sorted([asked, given], key=len, reverse=True)
        assert longer.startswith(shorter)
        # DiffusionGemma's opens a reply to a tool, which its prompt does not.
        assert longer[len(shorter) :].strip() in ("", "<think>", "</think>", "<think>\n\n</think>", "<|turn>model")
