"""Texts that cannot fit are refused by their characters alone; none that fits is."""

import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qlora_jax.serve.http.detokenize import TokenTexts
from qlora_jax.serve.http.lengths import longest_token
from tests.serve.http.fake import BASE, MAX_LENGTH

transformers = pytest.importorskip("transformers")


def test_the_longest_texts_that_fit_are_taken(client, service, tokenizer):
    """As many of the longest tokens as a slot holds, beside bos and one new token."""
    texts = {token: service.texts.bytes_of(token).decode("utf-8", "ignore") for token in range(len(tokenizer))}
    longest = max(texts.values(), key=len)
    assert service.most_characters == MAX_LENGTH * len(longest)
    for count, status in ((MAX_LENGTH - 2, 200), (MAX_LENGTH + 1, 400)):
        body = {"model": BASE, "prompt": longest * count, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_what_is_longer_is_not_tokenized(client, service, monkeypatch, kind):
    def counted(*arguments, **options):
        raise AssertionError("it was tokenized")

    long = "the quick brown fox " * 200_000
    monkeypatch.setattr("qlora_jax.serve.http.prompts.text_ids", counted)
    monkeypatch.setattr("qlora_jax.serve.http.prompts.rendered_ids", counted)
    for content in (long, [{"type": "text", "text": long}]):
        fields = {"prompt": long} if kind == "completions" else {"messages": [{"role": "user", "content": content}]}
        response = client.post(f"/v1/{kind}", json={"model": BASE, **fields})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert f"at most {service.most_characters:,}" in error["message"]


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_characters_that_a_normalizer_puts_together_count_apart(form):
    """One token of one character, of which the text held four."""
    whole = "\u1f82"  # alpha with two accents and an iota
    apart = unicodedata.normalize("NFD", whole)
    backend = Tokenizer(models.BPE({whole: 0, "a": 1}, [], unk_token=None))
    backend.normalizer = getattr(normalizers, form)()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer(apart * 5)["input_ids"] == [0] * 5
    assert longest_token(TokenTexts(tokenizer), len(tokenizer)) == len(apart) == 4


def test_pieces_of_characters_count_their_bytes():
    byte_level = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*sorted(byte_level), "ðŁį"])}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert longest_token(TokenTexts(tokenizer), len(tokenizer)) == 3
