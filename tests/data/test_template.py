"""Ids and masks, written out token by token."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import Chat, Completion, Row, Text, encode, encode_rows, load_chat_template

TURN = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"})
TWO_TURNS = (*TURN, {"role": "user", "content": "ok ?"}, {"role": "assistant", "content": "fine"})


def spell(encoded, tokenizer):
    """The tokens with the unscored ones apart: [("context", [...]), ("learned", [...]), ...]."""
    runs = []
    for i, scored in zip(encoded.ids.tolist(), encoded.scored.tolist(), strict=True):
        kind = "learned" if scored else "context"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(tokenizer.convert_ids_to_tokens(i))
    return runs


def chat(*messages, **settings):
    return Chat(messages=messages, **settings)


def test_text_is_the_tokenizers_ids_then_eos_and_all_but_the_first_is_scored(plain):
    encoded = encode(Text(text="hi there"), plain, seq_len=8)
    assert encoded.ids.tolist() == [0, 8, 19, 10, 1]
    assert encoded.scored.tolist() == [False, True, True, True, True]
    assert (encoded.ids.dtype, encoded.scored.dtype, encoded.cut) == (np.int32, np.bool_, False)


def test_text_without_bos_still_leaves_the_first_token_unscored(chatml):
    assert encode(Text(text="hi"), chatml, seq_len=8).scored.tolist() == [False, True]


def test_an_eos_that_the_tokenizer_adds_itself_is_not_doubled(build):
    tokenizer = build(specials=["<s>", "</s>"], bos="<s>", eos="</s>", adds_eos=True)
    text = encode(Text(text="hi"), tokenizer, seq_len=8)
    assert spell(text, tokenizer) == [("context", ["<s>"]), ("learned", ["hi", "</s>"])]
    pair = encode(Completion(prompt="hi ", completion="hello"), tokenizer, seq_len=8)
    assert spell(pair, tokenizer) == [("context", ["<s>", "hi", " "]), ("learned", ["hello", "</s>"])]


def test_completion_scores_the_completion_and_eos(plain):
    encoded = encode(Completion(prompt="hi ", completion="hello there"), plain, seq_len=16)
    assert spell(encoded, plain) == [
        ("context", ["<s>", "hi", " "]),
        ("learned", ["hello", " ", "there", "</s>"]),
    ]


def test_train_on_all_scores_the_prompt_too(plain, chatml):
    pair = encode(Completion(prompt="hi ", completion="ok"), plain, seq_len=16, train_on="all")
    assert pair.scored.tolist() == [False, True, True, True, True]
    messages = encode(chat(*TURN), chatml, seq_len=32, train_on="all")
    assert messages.scored.tolist() == [False] + [True] * 13
    only_user = encode(chat(TURN[0]), chatml, seq_len=32, train_on="all")
    assert only_user.scored.tolist() == [False] + [True] * 5


def test_llama3_chat_has_one_bos_and_learns_the_turns_end(llama3):
    encoded = encode(chat({"role": "system", "content": "be brief"}, *TURN), llama3, seq_len=64)
    head = ["<|start_header_id|>", "<|end_header_id|>"]
    assert spell(encoded, llama3) == [
        (
            "context",
            ["<|begin|>", head[0], "system", head[1], "\n\n", "be", " ", "brief", "<|eot_id|>"]
            + [head[0], "user", head[1], "\n\n", "hi", "<|eot_id|>", head[0], "assistant", head[1], "\n\n"],
        ),
        ("learned", ["hello", " ", "there", "<|eot_id|>"]),
    ]


def test_chatml_learns_every_turn_and_eos_though_it_is_the_padding_token(chatml):
    assert chatml.pad_token_id == chatml.eos_token_id
    assert spell(encode(chat(*TWO_TURNS), chatml, seq_len=64), chatml) == [
        (
            "context",
            ["<|im_start|>", "user", "\n", "hi", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"],
        ),
        ("learned", ["hello", " ", "there", "<|im_end|>"]),
        (
            "context",
            ["\n", "<|im_start|>", "user", "\n", "ok", " ", "?", "<|im_end|>", "\n"]
            + ["<|im_start|>", "assistant", "\n"],
        ),
        ("learned", ["fine", "<|im_end|>"]),
        ("context", ["\n"]),
    ]


def test_llama2_chat_learns_each_answer_with_its_eos(llama2):
    assert spell(encode(chat(*TWO_TURNS), llama2, seq_len=64), llama2) == [
        ("context", ["<s>", "[", "INST", "]", " ", "hi", " ", "[/", "INST", "]"]),
        ("learned", [" ", "hello", " ", "there", " ", "</s>"]),
        ("context", ["<s>", "[", "INST", "]", " ", "ok", " ", "?", " ", "[/", "INST", "]"]),
        ("learned", [" ", "fine", " ", "</s>"]),
    ]


def test_eos_is_appended_and_reachable_where_the_template_ends_otherwise(qwen_base):
    runs = spell(encode(chat(*TWO_TURNS), qwen_base, seq_len=64), qwen_base)
    assert runs[1] == ("learned", ["hello", " ", "there", "<|im_end|>"])
    assert runs[3] == ("learned", ["fine", "<|im_end|>", "\n", "<|endoftext|>"])
    assert len(runs) == 4


BLOCK_LAYOUTS = {
    "end inside, then a line break": lambda template: template,
    "end inside, then the next turn": lambda template: template.replace("{{ '\n' }}{% endfor %}", "{% endfor %}"),
    "end outside": lambda template: template.replace("<|im_end|>{% endg", "{% endg").replace(
        "{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    ),
}


@pytest.mark.parametrize("layout", BLOCK_LAYOUTS)
def test_generation_blocks_decide_and_the_turns_end_is_learned(layout, blocks):
    blocks.chat_template = BLOCK_LAYOUTS[layout](blocks.chat_template)
    runs = spell(encode(chat(*TWO_TURNS), blocks, seq_len=64), blocks)
    learned = [run for kind, run in runs if kind == "learned"]
    assert learned == [["hello", " ", "there", "<|im_end|>"], ["fine", "<|im_end|>"]]


def test_an_empty_last_turn_teaches_nothing(blocks):
    blocks.chat_template = blocks.chat_template.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}")
    blocks.chat_template = blocks.chat_template.replace("{{ '\n' }}{% endfor %}", "{% endfor %}")
    encoded = encode(chat(*TURN, TURN[0], {"role": "assistant", "content": ""}), blocks, seq_len=64)
    learned = [run for kind, run in spell(encoded, blocks) if kind == "learned"]
    assert learned == [["hello", " ", "there"]]


def test_a_template_that_opens_only_the_last_turn_with_a_think_block_scores_both_turns(build):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% "
        "endif %}"
    )
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    qwen3 = build(specials=specials, template=template, eos="<|im_end|>")
    runs = spell(encode(chat(*TWO_TURNS), qwen3, seq_len=64), qwen3)
    assert runs[1] == ("learned", ["hello", " ", "there", "<|im_end|>"])
    assert runs[3] == ("learned", ["<think>", "\n\n", "</think>", "\n\n", "fine", "<|im_end|>"])


def test_a_conversation_ending_with_the_user_gets_no_eos(qwen_base):
    runs = spell(encode(chat(*TURN, {"role": "user", "content": "bye"}), qwen_base, seq_len=64), qwen_base)
    assert runs[1] == ("learned", ["hello", " ", "there", "<|im_end|>"])
    assert runs[2][1][-2:] == ["<|im_end|>", "\n"]


def test_offsets_that_leave_out_spaces_do_not_shift_the_mask():
    """Some byte-level tokenizers (GPT-NeoX, RoBERTa) give spaces no width."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|begin|>", "<|eot_id|>"]
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eot_id|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    )
    answer = {"role": "assistant", "content": "é o"}
    assert spell(encode(chat(TURN[0], answer), tokenizer, seq_len=64), tokenizer) == [
        ("context", ["u", ":", "Ġ", "h", "i", "<|eot_id|>", "a", ":", "Ġ"]),
        ("learned", ["Ã", "©", "Ġ", "o", "<|eot_id|>"]),
    ]


def test_a_word_mark_that_the_tokenizer_puts_in_belongs_to_the_text_after_it():
    """Llama-2-like tokenizers put "▁" before the text that follows a special token."""
    backend = Tokenizer(models.WordLevel({"<u>": 0, "<a>": 1, "</s>": 2, "▁": 3, "hi": 4}, unk_token="hi"))
    backend.normalizer = normalizers.Prepend("▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", "<a>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    answer = {"role": "assistant", "content": "hi"}
    assert spell(encode(chat(TURN[0], answer), tokenizer, seq_len=64), tokenizer) == [
        ("context", ["<u>", "▁", "hi", "</s>", "<a>"]),
        ("learned", ["▁", "hi", "</s>"]),
    ]


def test_tool_calls_reach_the_template(chatml):
    chatml.chat_template = (
        "{{ tools[0].function.name }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "bye"}]}
    row = rows_of({"messages": [TURN[0], call], "tools": [{"name": "thanks"}]})
    runs = spell(encode_rows(row, chatml, seq_len=64)[0], chatml)
    assert runs[0][1][0] == "thanks"
    assert runs[1] == ("learned", ["bye", "<|im_end|>"])


def test_a_given_template_replaces_the_tokenizers(llama3):
    built_in = load_chat_template("chatml")
    runs = spell(encode(chat(*TURN), llama3, seq_len=64, chat_template=built_in), llama3)
    assert runs[0][1][0] == "<|begin|>"
    assert runs[0][1].count("<|begin|>") == 1
    assert runs[1][1][:3] == ["hello", " ", "there"]
    assert runs[1][1][-1] == "<|eot_id|>"  # <|im_end|> is ordinary text to this tokenizer, so eos follows it


def test_a_turns_end_that_is_no_special_token_is_learned_with_its_line_break(plain):
    built_in = load_chat_template("chatml")
    runs = spell(encode(chat(*TWO_TURNS), plain, seq_len=64, chat_template=built_in), plain)
    end = ["<unk>", "<unk>", "<unk>", "\n"]  # "<|", "im_end", "|>"
    assert [run for kind, run in runs if kind == "learned"] == [
        ["hello", " ", "there", *end],
        ["fine", *end, "</s>"],
    ]


def test_built_in_chatml_needs_no_bos(chatml):
    built_in = encode(chat(*TWO_TURNS), chatml, seq_len=64, chat_template=load_chat_template("chatml"))
    own = encode(chat(*TWO_TURNS), chatml, seq_len=64)
    assert built_in.ids.tolist() == own.ids.tolist()
    assert built_in.scored.tolist() == own.scored.tolist()


def test_load_chat_template(tmp_path, chatml):
    file = tmp_path / "mine.jinja"
    file.write_text(chatml.chat_template)
    assert load_chat_template(str(file)) == chatml.chat_template
    assert load_chat_template(None) is None
    with pytest.raises(FileNotFoundError) as error:
        load_chat_template("chatlm")
    assert str(error.value) == ("data.chat_template='chatlm' is neither a file nor a built-in template (chatml)")


def test_long_examples_are_cut(plain):
    encoded = encode(Completion(prompt="hi ", completion="hello there"), plain, seq_len=5)
    assert spell(encoded, plain) == [("context", ["<s>", "hi", " "]), ("learned", ["hello", " "])]
    assert encoded.cut
    assert not encode(Completion(prompt="hi ", completion="hello there"), plain, seq_len=7).cut


def rows_of(*values):
    return [Row(values=value, origin=f"train.jsonl, row {n}") for n, value in enumerate(values, start=1)]


def test_alpaca_rows_follow_the_template_if_there_is_one(plain, chatml):
    row = rows_of({"instruction": "hi", "input": "", "output": "hello"})
    as_chat = spell(encode_rows(row, chatml, seq_len=64)[0], chatml)
    assert as_chat[0][1][:4] == ["<|im_start|>", "user", "\n", "hi"]
    assert as_chat[1] == ("learned", ["hello", "<|im_end|>"])
    as_prompt = spell(encode_rows(row, plain, seq_len=64)[0], plain)
    assert as_prompt[0][1][-5:] == ["###", " ", "<unk>", ":", "\n"]
    assert as_prompt[1] == ("learned", ["hello", "</s>"])
    assert (
        spell(encode_rows(row, plain, seq_len=64, chat_template=chatml.chat_template)[0], plain)[0][1].count("user")
        == 1
    )


FAILURES = {
    "no template": (
        "plain",
        chat(*TURN),
        {},
        "chat rows need a chat template and the tokenizer has none; set data.chat_template to the path of a "
        "Jinja file or to a built-in one (chatml)",
    ),
    "no assistant": (
        "chatml",
        chat(TURN[0]),
        {},
        'no "assistant" message to learn from (the roles are user)',
    ),
    "the template raises": (
        "llama2",
        chat({"role": "system", "content": "ok"}, *TURN),
        {},
        "the chat template cannot render messages of the roles system, user, assistant: only user and assistant",
    ),
    "empty blocks": (
        "blocks",
        chat(*TURN),
        {
            "chat_template": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
        },
        "the chat template's {% generation %} blocks hold no assistant text; check data.chat_template",
    ),
    "no loop over the messages": (
        "chatml",
        chat(*TURN),
        {"chat_template": "{{ messages[0].content }}{{ messages[1].content }}"},
        "the chat template writes nothing for messages[1], or not in a loop over the messages; set "
        'data.chat_template to one that does, or give the rows as {"prompt", "completion"}',
    ),
    "history is dropped": (
        "chatml",
        chat(*TWO_TURNS),
        {
            "chat_template": "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
            "{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        },
        "the chat template leaves out the content of messages[1] (assistant): give a template that writes it "
        "(data.chat_template, --chat-template), or leave it out",
    ),
    "a name is no template": (
        "chatml",
        chat(*TURN),
        {"chat_template": "chatml"},
        "the chat template leaves out the content of messages[0] (user); the content of messages[1] (assistant): ",
    ),
    "the template divides by nothing": (
        "chatml",
        chat(*TURN),
        {"chat_template": "{% for m in messages %}{{ 1 / 0 }}{{ m.content }}{% endfor %}"},
        "the chat template cannot render messages of the roles user, assistant: division by zero",
    ),
    "no Jinja": (
        "chatml",
        chat(*TURN),
        {"chat_template": "{% for m in messages %}"},
        "the chat template is no valid Jinja: line 1: ",
    ),
    "seq_len": (
        "chatml",
        Text(text="hi"),
        {"seq_len": 1},
        "train.seq_len=1 must be at least 2: a token and the one it predicts",
    ),
    "train_on": (
        "chatml",
        Text(text="hi"),
        {"train_on": "answers"},
        'data.train_on=\'answers\' must be "completions" or "all"',
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_name_the_cause_and_the_next_step(case, request):
    tokenizer, example, settings, expected = FAILURES[case]
    with pytest.raises(ValueError) as error:
        encode(example, request.getfixturevalue(tokenizer), **{"seq_len": 64, **settings})
    assert str(error.value).startswith(expected)


def test_a_tokenizer_without_eos(build):
    tokenizer = build(specials=["<s>"], bos="<s>")
    with pytest.raises(ValueError) as error:
        encode(Text(text="hi"), tokenizer, seq_len=8)
    assert str(error.value) == (
        "the tokenizer has no eos token, so nothing would teach the model to stop; set eos_token in its "
        "tokenizer_config.json"
    )


def test_the_history_may_be_written_anew_at_each_turn(chatml):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    runs = spell(encode(chat(*TWO_TURNS), chatml, seq_len=64, chat_template=template), chatml)
    assert [run for kind, run in runs if kind == "learned"] == [
        ["hello", " ", "there", "<|im_end|>"],
        ["fine", "<|im_end|>"],
    ]


def test_a_chat_that_opens_with_the_assistant_has_that_turn_as_context(chatml):
    runs = spell(encode(chat(TURN[1], *TWO_TURNS), chatml, seq_len=64), chatml)
    assert [run for kind, run in runs if kind == "learned"] == [
        ["hello", " ", "there", "<|im_end|>"],
        ["fine", "<|im_end|>"],
    ]


def test_the_ids_are_those_of_transformers_own_rendering(llama3):
    expected = llama3.apply_chat_template(list(TWO_TURNS))["input_ids"]
    assert encode(chat(*TWO_TURNS), llama3, seq_len=64).ids.tolist() == expected


def test_a_row_cannot_forge_what_marks_a_turn(chatml):
    asked = {"role": "user", "content": "hi \ufdd00:1\ufdd1 there \ufdd0)\ufdd1"}
    runs = spell(encode(chat(asked, TURN[1]), chatml, seq_len=64), chatml)
    assert [run for kind, run in runs if kind == "learned"] == [["hello", " ", "there", "<|im_end|>"]]
