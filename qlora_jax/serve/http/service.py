"""What every endpoint works with."""

import asyncio
import concurrent.futures
import functools
import logging
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qlora_jax.data.isolated import Isolated
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.chat_template import Templates
from qlora_jax.serve.http.detokenize import TokenTexts
from qlora_jax.serve.http.errors import ApiError, from_engine, unknown_model
from qlora_jax.serve.http.exchange import Exchange, Wanted
from qlora_jax.serve.http.fields import ChatFields, CompletionFields, Generation
from qlora_jax.serve.http.lengths import longest_token
from qlora_jax.serve.http.metrics import Metrics
from qlora_jax.serve.http.prompts import Prompt, chat_prompt, completion_prompts
from qlora_jax.serve.http.running import Run, Submits
from qlora_jax.serve.request import Refused, UnknownModel

logger = logging.getLogger("qlora_jax.serve")


class Engine(Submits, Protocol):
    """The engine as the server sees it."""

    @property
    def queue(self) -> int: ...
    def view(self) -> Any: ...
    def models(self) -> Any: ...
    def load_adapter(self, name: str, folder: str | None = None) -> Any: ...
    def unload_adapter(self, name: str) -> Any: ...
    def drain(self, timeout: float) -> Any: ...


class Service:
    """An engine and what turns its tokens into text.

    Args:
      engine: started.
      tokenizer: the base's.
      base: the base's name in requests.
      max_length: tokens that a slot holds, prompt and answer together.
      vocabulary: token ids that the base knows.
      chat_template_of: the chat template that a model's chats are rendered with; None for the tokenizer's.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        base: str,
        max_length: int,
        vocabulary: int,
        chat_template_of: Callable[[str], Templates | None] = lambda model: None,
    ):
        self.engine, self.tokenizer, self.base = engine, tokenizer, base
        self.max_length, self.vocabulary = max_length, vocabulary
        self.texts = TokenTexts(tokenizer)
        self.most_characters = max_length * longest_token(self.texts, len(tokenizer))
        self._isolated = Isolated(tokenizer)
        self.metrics = Metrics(engine.view)
        self.draining = False
        self._chat_template_of = chat_template_of
        self._exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
        # One thread: a long prompt, or a list of thousands of adapters for an error, holds up other requests, but no
        # answer that is being written.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "beside")

    async def _beside(self, work: Callable[[], Exchange]) -> Exchange:
        """What `work` gives, beside the server's loop. Where nobody waits any more, it is not begun, or undone."""
        future = self._thread.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_abandon)
            raise

    def completion_prompts(self, fields: CompletionFields) -> list[Prompt]:
        """Those of a request. Raises ApiError."""
        return completion_prompts(fields, self.tokenizer, self.vocabulary, most=self.most_characters)

    def chat_prompts(self, fields: ChatFields) -> list[Prompt]:
        """The one of a request, in the model's own chat template. Raises ApiError."""
        template = self._template(fields.model)
        if template is None or template == self.tokenizer.chat_template:
            return [chat_prompt(fields, self.tokenizer, most=self.most_characters)]
        # Nobody knows what an adapter's template does.
        render = functools.partial(self._isolated.text, template)
        return [chat_prompt(fields, self.tokenizer, most=self.most_characters, render=render)]

    def _template(self, model: str) -> Templates | None:
        try:
            return self._chat_template_of(model)
        except (ValueError, OSError) as error:
            logger.warning(f"adapter {model!r}: {error}")
            raise ApiError(400, f"the chat template of {model!r} cannot be read", param="model") from error

    def close(self) -> None:
        """Ends the thread beside the server's loop, and what it has started."""
        self._thread.submit(self._isolated.close)
        self._thread.shutdown()

    async def exchange(
        self, fields: Generation, find_prompts: Callable[[], Sequence[Prompt]], *, param: str, **wanted: Any
    ) -> Exchange:
        """Submits what a request asks for; `param` is the field that holds the prompt, `wanted` are Wanted's fields.

        Raises:
          ApiError: what the engine refuses.
        """
        seed = secrets.randbits(63) if fields.seed is None else fields.seed
        whole = Wanted(adapter=None if fields.model == self.base else fields.model, seed=seed, **wanted)
        submit = functools.partial(self._submit, fields, find_prompts, whole, param, asyncio.get_running_loop())
        exchange = await self._beside(submit)
        self._exchanges.add(exchange)
        return exchange

    def _submit(
        self,
        fields: Generation,
        find_prompts: Callable[[], Sequence[Prompt]],
        wanted: Wanted,
        param: str,
        loop: asyncio.AbstractEventLoop,
    ) -> Exchange:
        prompts = find_prompts()
        self._check_choices(len(prompts) * (fields.n or 1))
        try:
            submit = functools.partial(Run, self.engine, loop=loop)
            return Exchange(submit, self.tokenizer, fields, prompts, wanted, self.max_length)
        except UnknownModel as error:
            raise unknown_model(fields.model, [name for name, _ in self.engine.models()], error.reason) from error
        except (Refused, ValueError) as error:
            self.check_alive()
            raise from_engine(error, param=param) from error

    def _check_choices(self, count: int) -> None:
        """Refuses what could never be taken, however often it is asked."""
        if count > self.engine.queue:
            most = f"at most {self.engine.queue} are taken together: ask for fewer, or serve with a longer --queue"
            raise ApiError(400, f"{count} answers are asked for (prompts times n), {most}", param="n")

    def check_alive(self) -> None:
        """Raises ApiError 503 after a fault that the engine did not survive."""
        view = self.engine.view()
        if view.state == "dead":
            raise ApiError(503, f"the engine has stopped after a fault ({view.error}): start the server again")

    def cancel_all(self) -> None:
        """Ends whatever is being answered."""
        for exchange in list(self._exchanges):
            exchange.run.cancel()


def _abandon(future: concurrent.futures.Future[Exchange]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().run.cancel()
