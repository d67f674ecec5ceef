"""What every endpoint works with."""

import asyncio
import concurrent.futures
import functools
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.serve.http.detokenize import TokenTexts
from qlora_jax.serve.http.errors import ApiError, from_engine, unknown_model
from qlora_jax.serve.http.exchange import Exchange, Wanted
from qlora_jax.serve.http.fields import Generation
from qlora_jax.serve.http.metrics import Metrics
from qlora_jax.serve.http.prompts import Prompt
from qlora_jax.serve.http.running import Submits
from qlora_jax.serve.request import Refused, UnknownModel

T = TypeVar("T")


class Engine(Submits, Protocol):
    """The engine as the server sees it."""

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
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, base: str, max_length: int, vocabulary: int):
        self.engine, self.tokenizer, self.base = engine, tokenizer, base
        self.max_length, self.vocabulary = max_length, vocabulary
        self.texts = TokenTexts(tokenizer)
        self.metrics = Metrics(engine.view)
        self.draining = False
        self._exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
        # One thread: a long prompt, or a list of thousands of adapters for an error, holds up other requests, but no
        # answer that is being written.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "beside")

    async def beside(self, work: Callable[[], T]) -> T:
        """Runs `work` beside the server's loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

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
        exchange = await self.beside(submit)
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
        try:
            return Exchange(self.engine, self.tokenizer, fields, prompts, wanted, room=self.max_length, loop=loop)
        except UnknownModel as error:
            raise unknown_model(fields.model, [name for name, _ in self.engine.models()]) from error
        except (Refused, ValueError) as error:
            self.check_alive()
            raise from_engine(error, param=param) from error

    def check_alive(self) -> None:
        """Raises ApiError 503 after a fault that the engine did not survive."""
        view = self.engine.view()
        if view.state == "dead":
            raise ApiError(503, f"the engine has stopped after a fault ({view.error}): start the server again")

    def cancel_all(self) -> None:
        """Ends whatever is being answered."""
        for exchange in list(self._exchanges):
            exchange.run.cancel()
