"""Text from tokens: whole characters, nothing taken back, stop strings found wherever they lie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.serve.http.choice import Choice
from qlora_jax.serve.http.detokenize import Detokenizer, TokenTexts
from qlora_jax.serve.http.stops import StopFinder
from qlora_jax.serve.request import Finished, Token


def pieces(tokenizer, ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.fixture(scope="session")
def sentencepiece():
    """As Llama 2 has it: spaces are "▁", unknown characters are byte tokens, the first space is not written."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Paris", "▁is", "a", "é"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def byte_ids(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


def test_characters_come_whole(tokenizer):
    ids = tokenizer(" stir – and 🍳", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids) == [" s", "ti", "r", "", " –", " and", " ", "", "", "", "🍳", ""]


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    ids = tokenizer("é🍳", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids[:-1]) == ["", "é", "", "", "", "\ufffd"]


def test_endless_rubbish_does_not_hold_the_stream_up(tokenizer):
    continuation = tokenizer("é", add_special_tokens=False)["input_ids"][-1]
    said = pieces(tokenizer, [continuation] * 40)
    assert "".join(said) == "\ufffd" * 40
    assert len("".join(said[:20])) >= 12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 2047), max_size=24))
def test_what_is_streamed_is_what_is_decoded_at_once(tokenizer, ids):
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(tokenizer, ids)) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=12))
def test_text_comes_back_through_single_bytes(sentencepiece, text):
    said = pieces(sentencepiece, byte_ids("x" + text))
    assert "".join(said) == "x" + text
    assert not any("\ufffd" in piece for piece in said) or "\ufffd" in text


def test_a_leading_space_is_kept_after_a_prompt_and_not_written_without(sentencepiece):
    paris, is_, bos = (sentencepiece.convert_tokens_to_ids(word) for word in ("▁Paris", "▁is", "<s>"))
    assert pieces(sentencepiece, [paris, is_]) == ["Paris", " is", ""]
    assert pieces(sentencepiece, [paris, is_], context=[bos, is_]) == [" Paris", " is", ""]
    assert pieces(sentencepiece, [bos, paris, bos, is_]) == ["", "Paris", "", " is", ""]


def test_what_was_said_stays_said(sentencepiece):
    """This decoder turns a whole run of bytes into U+FFFD once one of them is bad."""
    a = sentencepiece.convert_tokens_to_ids("a")
    assert sentencepiece.decode([*byte_ids("é"), 2 + 0xFF, a]) == "\ufffd\ufffd\ufffda"
    assert pieces(sentencepiece, [*byte_ids("é"), 2 + 0xFF, a]) == ["", "é", "", "\ufffda", ""]


def test_single_tokens_as_bytes(tokenizer, sentencepiece):
    texts = TokenTexts(tokenizer)
    ids = tokenizer(" é", add_special_tokens=False)["input_ids"]
    assert b"".join(map(texts.bytes_of, ids)) == " é".encode()
    assert [texts.text_of(i) for i in ids] == [" ", "bytes:\\xc3", "bytes:\\xa9"]
    assert (texts.text_of(2), texts.bytes_of(5000)) == ("<|im_end|>", b"")
    texts = TokenTexts(sentencepiece)
    assert [texts.text_of(i) for i in (0, 2 + 0xC3, 2 + 0x41, 259)] == ["<s>", "bytes:\\xc3", "A", " Paris"]


@pytest.mark.parametrize(
    "stops, given, passed, stopped",
    [
        (["END"], ["a E", "N", "D b"], ["a ", "", ""], True),
        (["END"], ["a E", "N", "X"], ["a ", "", "ENX"], False),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["bc", "ab"], ["xa", "bc"], ["x", ""], True),  # the one that begins first
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        ([], ["a", "b"], ["a", "b"], False),
    ],
)
def test_stop_strings(stops, given, passed, stopped):
    finder = StopFinder(stops)
    assert [finder.push(text) for text in given] == passed
    assert finder.stopped == stopped
    assert finder.push("more") == ("" if stopped else "more")


def test_what_looked_like_a_stop_string_comes_at_the_end():
    finder = StopFinder(["END"])
    assert (finder.push("the E"), finder.push("N"), finder.finish()) == ("the ", "", "EN")


def test_tokens_come_with_the_text_that_they_begin(tokenizer):
    words = ["é", " st", "o", "ps"]
    ids = [i for word in words for i in tokenizer(word, add_special_tokens=False)["input_ids"]]
    choice = Choice(tokenizer, [1], ["op"], echoed=10)
    said = [choice.push(Token(i)) for i in ids]
    found = [(piece.text, [(placed.token.id, placed.offset) for placed in piece.tokens]) for piece in said if piece]
    assert len(ids) == 5  # "é" is two tokens
    assert found == [("é", [(ids[0], 10), (ids[1], 10)]), (" st", [(ids[2], 11)])]
    assert (choice.reason, choice.generated) == ("stop", 5)
    assert not choice.finish(Finished("cancelled", cached=3)) and choice.cached == 3


def test_a_stop_token_is_reported_and_has_no_text(tokenizer):
    choice = Choice(tokenizer, [1], [])
    assert choice.push(Token(40)).text
    last = choice.finish(Finished("stop", token=Token(2, -0.5)), lists_end=True)
    assert (last.text, [(placed.token.id, placed.offset) for placed in last.tokens]) == ("", [(2, 1)])
    assert (choice.reason, choice.generated) == ("stop", 1)
