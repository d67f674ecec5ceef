"""How long a text can be that still fits: what is longer is refused before it is tokenized, which takes seconds."""

import unicodedata

from qlora_jax.serve.http.detokenize import TokenTexts


def longest_token(texts: TokenTexts, count: int) -> int:
    """The most characters of a text that one of the first `count` tokens can stand for.

    A normalizer may have put characters together (NFC, NFKC): taken apart (NFKD), a token's text is at least as long as
    what it was made of. Of a piece of a character, each byte counts as one. Only a tokenizer that drops characters,
    such as repeated spaces, can make fewer tokens of a text.
    """
    return max((_characters(texts.bytes_of(token)) for token in range(count)), default=1)


def _characters(raw: bytes) -> int:
    try:
        return len(unicodedata.normalize("NFKD", raw.decode()))
    except UnicodeDecodeError:
        return len(raw)
