"""Many rows: what is cut, split, left out, named and refused."""

import json
import logging
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import Completion, Row, Text, encode, encode_rows
from qlora_jax.data.encoding import Report, Settings, encode_all, judge

PAIR = {"prompt": "hi ", "completion": "ok"}


def rows_of(*values):
    return [Row(values=value, origin=f"train.jsonl, row {n}") for n, value in enumerate(values, start=1)]


def test_rows_that_nothing_can_be_learned_from_are_left_out_and_named(chatml, caplog):
    rows = rows_of(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"text": "\ud800"},
        {"prompt": "hi", "completion": ""},
        {"question": "hi"},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        PAIR,
    )
    rows.append(Row(values={}, origin="train.jsonl, row 8", problem="not valid JSON at column 1: Extra data"))
    with caplog.at_level(logging.WARNING):
        kept = encode_rows(rows, chatml, seq_len=64)
    assert kept.rows.tolist() == [0, 6]
    assert caplog.messages == [
        "6 of 8 rows are left out, from which nothing can be learned: "
        'train.jsonl, row 2: no "assistant" message to learn from (the roles are user); '
        "train.jsonl, row 3: column 'text': character 0 is half a surrogate pair, which is no Unicode; "
        "train.jsonl, row 4: the completion is empty: there is nothing to learn; "
        'train.jsonl, row 5: found the columns question; a row needs {"text"}, {"prompt", "completion"}, {"messages"}, '
        '{"instruction", "output", optional "input"} (Alpaca) or {"conversations"} (ShareGPT); '
        'train.jsonl, row 6: no "assistant" message to learn from (the roles are assistant); and 1 more'
    ]


@pytest.mark.parametrize(
    ("rows", "bad", "allowed", "passes"),
    [(100, 10, None, True), (100, 11, None, False), (2000, 20, None, True), (2000, 21, None, False)]
    + [(10, 1, 1, True), (10, 1, 0, False), (10, 5, 0.5, True), (10, 6, 0.5, False)],
)
def test_more_bad_rows_than_allowed_are_refused(rows, bad, allowed, passes):
    report = Report(rows=rows, documents=rows - bad, tokens=rows, bad=[("a.jsonl, row 1", "why")] * bad)
    settings = Settings(seq_len=8, max_bad_rows=allowed)
    if passes:
        judge(report, settings)
        return
    with pytest.raises(ValueError, match=f"{bad} of {rows} rows cannot be learned from, and config.data.max_bad_rows"):
        judge(report, settings)


def test_long_rows_are_cut_split_or_dropped(plain, caplog):
    rows = rows_of({"text": "hi hi hi hi hi"}, {"text": "ok"})
    with caplog.at_level(logging.WARNING):
        cut = encode_rows(rows, plain, seq_len=5)
        split = encode_rows(rows, plain, seq_len=5, long_rows="split")
        dropped = encode_rows(rows, plain, seq_len=5, long_rows="drop")
    assert [len(one.ids) for one in cut] == [5, 3]
    assert [len(one.ids) for one in split] == [5, 5, 3, 3]
    assert [len(one.ids) for one in dropped] == [3]
    assert caplog.messages == [
        "1 of 2 rows are longer than train.seq_len=5 and are cut (config.data.long_rows): "
        "6 tokens (42.9%) are not seen",
        "1 of 2 rows are longer than train.seq_len=5 and are split (config.data.long_rows): every token is seen",
        "1 of 2 rows are longer than train.seq_len=5 and are left out (config.data.long_rows): "
        "11 tokens (78.6%) are not seen",
    ]


@given(length=st.integers(2, 60), seq_len=st.integers(2, 12), start=st.integers(0, 59))
def test_splitting_scores_every_token_once(length, seq_len, start):
    from qlora_jax.data.documents import Collector
    from qlora_jax.data.encoding import _add

    ids, scored = list(range(length)), np.arange(length) >= max(1, min(start, length - 1))
    collector, report = Collector(), Report()
    _add(collector, report, Settings(seq_len=seq_len, long_rows="split"), 0, "row", ids, scored)
    documents = collector.documents()
    seen = np.concatenate([one.ids[one.scored] for one in documents])
    assert seen.tolist() == np.flatnonzero(scored).tolist()
    assert max(documents.lengths) <= seq_len
    # What each scored token is predicted from is the token before it.
    assert all((one.ids[1:] == one.ids[:-1] + 1).all() for one in documents)


def test_a_row_cut_before_its_answer_is_named(plain):
    with pytest.raises(ValueError) as error:
        encode_rows(rows_of({"prompt": "how are you ", "completion": "ok"}), plain, seq_len=3)
    assert str(error.value) == (
        "none of the 1 rows has a token to learn within train.seq_len=3: train.jsonl, row 1: no token to learn within "
        "train.seq_len=3; it has 9 and is cut before its answer: raise train.seq_len"
    )


def test_columns_that_are_not_read_are_named_once(plain, caplog):
    with caplog.at_level(logging.WARNING):
        encode_rows(rows_of({**PAIR, "id": 3}, {**PAIR, "id": 4, "score": 1.0}), plain, seq_len=8)
    assert caplog.messages == ["columns that are not read: id, score"]


def test_nothing_is_said_where_all_is_well(plain, caplog):
    assert len(encode_rows(rows_of(PAIR), plain, seq_len=8)) == 1
    assert caplog.messages == []


def test_five_bytes_a_token(plain):
    documents, _ = encode_all(rows_of(*[{"text": "hi there " * 50}] * 200), plain, Settings(seq_len=512))
    tokens = documents.lengths.sum()
    held = sum(array.nbytes for array in (documents.ids, documents.scored, documents.starts, documents.rows))
    assert held == 5 * tokens + 8 * (2 * len(documents) + 1)


def test_a_date_in_a_template_is_the_runs(chatml):
    chatml.chat_template = (
        "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    row = rows_of({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]})
    given_day, _ = encode_all(row, chatml, Settings(seq_len=64), today=datetime(2020, 1, 2))
    again, _ = encode_all(row, chatml, Settings(seq_len=64), today=datetime(2020, 1, 2))
    assert given_day.ids.tolist() == again.ids.tolist()
    texts = [draft_text(chatml, row[0], today) for today in (datetime(2020, 1, 2), datetime(2021, 3, 4))]
    assert [text[:10] for text in texts] == ["2020-01-02", "2021-03-04"]


def draft_text(tokenizer, row, today):
    from qlora_jax.data import to_example
    from qlora_jax.data.chat import ChatTemplate

    return ChatTemplate(tokenizer, None, today).render(to_example(row, alpaca_as_chat=True)).text


def llama2_like():
    """SentencePiece's ways: "▁" for spaces, one put before the text, bos around it."""
    symbols = ["<unk>", "<s>", "</s>", "▁", *"abcde:\n", "▁a", "▁ab", "bc"]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [("▁", "a"), ("▁a", "b"), ("b", "c")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level():
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "Ġa", "<s>", "</s>"]
    merges = [("a", "b"), ("b", "c"), ("Ġ", "a")]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"llama2": llama2_like(), "bytes": byte_level()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(prompt=st.text("abc :\n", min_size=1, max_size=8), completion=st.text("abc :\n", min_size=1, max_size=8))
def test_tokens_of_the_parts_are_tokens_of_the_whole(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    encoded = encode(Completion(prompt=prompt, completion=completion), tokenizer, seq_len=64)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert encoded.ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == prompt + completion
    # What is learned holds the completion, and begins no more than a token before it.
    learned = encoded.ids[encoded.scored].tolist()
    assert learned == encoded.ids.tolist()[-len(learned) :]
    given = encoded.ids[~encoded.scored][1:]  # the first token is never a label
    assert (prompt + " ").startswith(tokenizer.decode([*whole[:1], *given], skip_special_tokens=True)) or not len(given)


@pytest.mark.parametrize("text", ["<s>ab", "ab</s>", "<s>ab</s>", "ab"])
def test_bos_and_eos_that_a_text_has_are_not_doubled(text):
    tokenizer = TOKENIZERS["llama2"]
    ids = encode(Text(text=text), tokenizer, seq_len=64).ids.tolist()
    assert (ids.count(1), ids.count(2), ids[0], ids[-1]) == (1, 1, 1, 2)
    pair = encode(Completion(prompt="<s>a", completion="b</s>"), tokenizer, seq_len=64)
    assert (pair.ids.tolist().count(1), pair.ids.tolist().count(2)) == (1, 1)
    assert pair.scored[-1]


def test_a_report_survives_json():
    report = Report(rows=3, bad=[("a", "b")], unread=["c"], counts=[3])
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
