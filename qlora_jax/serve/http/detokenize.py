"""Text from token ids as they come, never cut inside a character and never changed afterwards."""

import re
from collections.abc import Sequence

from qlora_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet
CONTEXT = 8  # tokens before, which decide whether a token's leading space is kept
MOST_HELD = 8  # a character has at most four bytes, so at most four tokens
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer:
    """The text that each new token adds.

    Tokens whose bytes end inside a character are held back until it is whole. Special tokens have no text.

    Args:
      tokenizer: a transformers tokenizer.
      context: the tokens before the first.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._before, self._held = list(context[-CONTEXT:]), list[int]()

    def push(self, token: int) -> str:
        """The text that is certain now; often that of this token, sometimes none."""
        self._held.append(token)
        text = self._text_of_held()
        if not text.endswith(REPLACEMENT):
            return self._release(len(self._held), text)
        return self._release_settled(text) if len(self._held) >= MOST_HELD else ""

    def finish(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        return self._release(len(self._held), self._text_of_held())

    def _release(self, count: int, text: str) -> str:
        before, self._held = self._held[:count], self._held[count:]
        # Tokens without text do not push out those that the next one's leading space depends on.
        self._before = before if text else [*self._before, *before][-CONTEXT:]
        return text

    def _release_settled(self, text: str) -> str:
        """The oldest tokens, where their text alone is the beginning of all held tokens' text."""
        for count in range(len(self._held) - 3, 0, -1):
            head = self._new_text(self._held[:count])
            if text.startswith(head):
                return self._release(count, head)
        return ""

    def _text_of_held(self) -> str:
        return self._new_text(self._held)

    def _new_text(self, ids: Sequence[int]) -> str:
        known, whole = self._decode(self._before), self._decode([*self._before, *ids])
        # Decoders of byte tokens may change their mind about a whole run of bytes; what was said, stays said.
        return whole[len(known) :] if whole.startswith(known) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TokenTexts:
    """Single tokens as bytes and as text, for lists of log probabilities."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_of = _byte_alphabet() if "ByteLevel" in repr(decoder) else None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that the token stands for; none for ids beyond the tokenizer's."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        if piece is None:
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece if character in self._byte_of)
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """The text; tokens that are parts of characters as `bytes:\\xe2\\x80`, so that they stay distinct."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
