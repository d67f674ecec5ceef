"""Chat templates from elsewhere, rendered in a process of their own: one can go on for ever, or fill the memory."""

import multiprocessing
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qlora_jax.data.prompt import chat_text
from qlora_jax.data.tokenizer import Tokenizer

# What templates raise over messages and tools that they do not expect.
TEMPLATE_ERRORS = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError)
SECONDS, START_SECONDS = 10.0, 120.0
MEMORY, CHARACTERS = 1 << 30, 1 << 24
# Templates that took too long or too much, and for how many seconds they are not tried again.
REFUSED, REFUSED_SECONDS = 256, 60.0


class Isolated:
    """`chat_text` in other templates than the tokenizer's. Starts its process with the first chat. Not thread-safe.

    Args:
      tokenizer: whose special tokens the templates know.
      seconds: that rendering a chat may take.
    """

    def __init__(self, tokenizer: Tokenizer, *, seconds: float = SECONDS):
        self._tokenizer, self._seconds = tokenizer, seconds
        self._process: Any = None
        self._connection: Connection | None = None
        self._refused: dict[str, tuple[str, float]] = {}  # the reason, and until when

    def text(
        self,
        template: str | Mapping[str, str],
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat in that template.

        Raises:
          ValueError: as `chat_text` does, or the template took too long or too much; and is left alone for a minute.
        """
        reason, until = self._refused.get(repr(template), ("", 0.0))
        if time.monotonic() < until:
            raise ValueError(reason)
        if self._process is not None and not self._process.is_alive():
            self.close()
        connection = self._connection or self._start()
        connection.send((template, messages, {"tools": tools, "options": options}))
        try:
            if not connection.poll(self._seconds):
                raise EOFError(f"takes more than {self._seconds:g} seconds")
            rendered, text = connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise self._refusal(template, str(error) or f"takes more than {MEMORY:,} bytes") from error
        if not rendered:
            raise ValueError(text)
        return text

    def close(self) -> None:
        """Ends the process; the next chat starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._connection
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        # Not forked: this process has threads.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_render_all, args=(theirs, self._tokenizer), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_SECONDS) or not self._connection.recv():
            raise RuntimeError("the process that renders adapters' chat templates does not start")
        return self._connection

    def _refusal(self, template: str | Mapping[str, str], words: str) -> ValueError:
        if len(self._refused) >= REFUSED:
            self._refused.clear()
        reason = f"the adapter's chat template {words}: give it another"
        self._refused[repr(template)] = reason, time.monotonic() + REFUSED_SECONDS
        return ValueError(reason)


def _render_all(connection: Connection, tokenizer: Tokenizer) -> None:
    """The other process: renders what it is sent until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to hear
    most = _virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    connection.send(True)
    while True:
        try:
            template, messages, more = connection.recv()
        except EOFError:
            return
        connection.send(_rendered(tokenizer, template, messages, more))


def _rendered(tokenizer: Tokenizer, template: Any, messages: Any, more: Mapping[str, Any]) -> tuple[bool, str]:
    """(whether it could be rendered, the text or the reason)."""
    try:
        tokenizer.chat_template = template
        text = chat_text(messages, tokenizer, **more)
    except TEMPLATE_ERRORS as error:
        return False, str(error)
    return (True, text) if len(text) <= CHARACTERS else (False, f"the chat template writes {len(text):,} characters")


def _virtual_memory() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
