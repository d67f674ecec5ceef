"""Random requests, good and bad, many at once; every answer is compared with what that model says alone."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
NEW_TOKENS = 8
# Raw bodies, and the status that each must get.
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"[" * 50_000, 400),
    (b"\xff\xfe", 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "../base", "prompt": "a"}', 404),
    (b'{"model": "/etc/passwd", "prompt": "a"}', 404),
    (b'{"model": "a\\u0000b", "prompt": "a"}', 404),
    (b'{"model": "base", "prompt": []}', 400),
    (b'{"model": "base", "prompt": [-1]}', 400),
    (b'{"model": "base", "prompt": [99999999]}', 400),
    (b'{"model": "base", "prompt": "a", "max_tokens": 1000000}', 400),
    (b'{"model": "base", "prompt": "a", "temperature": 1e400}', 400),
    (b'{"model": "base", "prompt": "a", "n": 1000}', 400),
    (b'{"model": "base", "prompt": "a", "logit_bias": {"1": 100}}', 400),
    (b'{"model": "base", "prompt": "\\ud800"}', 400),
    (b'{"model": "base", "prompt": "' + b"a" * (5 << 20) + b'"}', 413),
)


@dataclasses.dataclass
class Swapped:
    """An adapter whose weights are exchanged while it is served.

    Attributes:
      name: what it is called.
      files: its weights, to be replaced by each of `contents` in turn.
      history: the contents (0 or 1) that it has had; an answer may be by any from the one that stood when the request
        was sent (`stable`) to the last.
    """

    name: str
    file: Path
    contents: tuple[Path, Path]
    history: list[int] = dataclasses.field(default_factory=lambda: [0])
    stable: int = 0

    def replace(self) -> None:
        """Writes the other content under the same name, in one step."""
        self.history.append(1 - self.history[-1])
        beside = self.file.with_suffix(".new")
        shutil.copyfile(self.contents[self.history[-1]], beside)
        os.replace(beside, self.file)


@dataclasses.dataclass
class Report:
    """What happened.

    `failures` says what must not have happened, `kinds` counts requests by kind, `statuses` answers by HTTP status.
    """

    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Traffic:
    """Sends requests to a server.

    Args:
      url: its address.
      admin_key: opens loading and unloading.
      prompts: token ids.
      answers: for each model, the greedy text after each prompt; a model with several contents has "name#0", "name#1".
      swapped: an adapter that is exchanged meanwhile.
      spare: one that is unloaded and loaded meanwhile.
      long: tokens of the answers that clients do not wait for.
      seed: of what is sent.
    """

    def __init__(
        self,
        url: str,
        admin_key: str,
        prompts: Sequence[Sequence[int]],
        answers: Mapping[str, Sequence[str]],
        *,
        swapped: Swapped,
        spare: str,
        long: int,
        seed: int = 0,
    ):
        self._url, self._admin = url, {"Authorization": f"Bearer {admin_key}"}
        self._prompts, self._answers, self._swapped, self._spare = prompts, answers, swapped, spare
        self._long = long
        self._models = sorted({name.partition("#")[0] for name in answers})
        self._random = random.Random(seed)
        self._changing = asyncio.Lock()
        self.report = Report()
        # (share of the requests, what is sent)
        self._kinds: tuple[tuple[int, Callable[[httpx.AsyncClient], Awaitable[None]]], ...] = (
            (35, self._whole),
            (25, self._streamed),
            (10, self._several),
            (8, self._left_in_the_middle),
            (7, self._left_at_once),
            (12, self._malformed),
            (2, self._exchange),
            (1, self._unload_and_load),
        )

    async def run(self, requests: int, at_once: int) -> Report:
        """Sends so many requests, `at_once` of them at a time."""
        start = time.perf_counter()
        left = iter(range(requests))
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._work(client, left) for _ in range(at_once)))
        self.report.seconds = time.perf_counter() - start
        return self.report

    async def _work(self, client: httpx.AsyncClient, left: Any) -> None:
        shares = [share for share, _ in self._kinds]
        for _ in left:
            [(_, send)] = self._random.choices(self._kinds, shares)
            self.report.kinds[send.__name__.strip("_")] += 1
            try:
                await send(client)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self._fail(f"{send.__name__}: {type(error).__name__} {error}")

    def _fail(self, words: str) -> None:
        self.report.failures.append(words[:300])

    def _status(self, response: httpx.Response, *expected: int) -> bool:
        """Counts a status, and whether it is one of those."""
        self.report.statuses[response.status_code] += 1
        if response.status_code not in expected:
            self._fail(f"status {response.status_code}, expected {expected}: {response.text}")
        return response.status_code == 200

    def _draw(self) -> tuple[str, int, dict[str, Any]]:
        """A model, the number of a prompt, and the fields of a request for them."""
        model, number = self._random.choice(self._models), self._random.randrange(len(self._prompts))
        fields = {"model": model, "prompt": self._prompts[number], "max_tokens": NEW_TOKENS, "temperature": 0}
        return model, number, fields

    def _statuses_of(self, model: str) -> tuple[int, ...]:
        return (200, 404) if model == self._spare else (200,)

    def _compare(self, model: str, number: int, since: int, text: str) -> None:
        """The text must be what this model says, of the contents that it had since the request was sent."""
        names = [model]
        if model == self._swapped.name:
            names = [f"{model}#{content}" for content in set(self._swapped.history[since:])]
        if text not in [self._answers[name][number] for name in names]:
            by = [name for name, texts in self._answers.items() if texts[number] == text]
            self._fail(f"{model} answered prompt {number} with {text!r}, which {by or 'nobody'} says")

    async def _whole(self, client: httpx.AsyncClient) -> None:
        model, number, fields = self._draw()
        since = self._swapped.stable
        response = await client.post("/v1/completions", json=fields)
        if self._status(response, *self._statuses_of(model)):
            self._compare(model, number, since, response.json()["choices"][0]["text"])

    async def _streamed(self, client: httpx.AsyncClient) -> None:
        model, number, fields = self._draw()
        since, text = self._swapped.stable, ""
        async with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
            if self._status(response, *self._statuses_of(model)):
                async for line in response.aiter_lines():
                    if line and line != "data: [DONE]":
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                self._compare(model, number, since, text)

    async def _several(self, client: httpx.AsyncClient) -> None:
        """Two choices, with log probabilities of prompt and answer."""
        model, number, fields = self._draw()
        since, prompt = self._swapped.stable, fields["prompt"]
        response = await client.post("/v1/completions", json={**fields, "n": 2, "echo": True, "logprobs": 2})
        if not self._status(response, *self._statuses_of(model)):
            return
        for choice in response.json()["choices"]:
            scores = choice["logprobs"]
            if scores["token_logprobs"][0] is not None or None in scores["token_logprobs"][1:]:
                self._fail(f"{model}: only a prompt's first token has no log probability")
            start = scores["text_offset"][len(prompt)] if len(scores["tokens"]) > len(prompt) else len(choice["text"])
            self._compare(model, number, since, choice["text"][start:])

    async def _left_in_the_middle(self, client: httpx.AsyncClient) -> None:
        model, _, fields = self._draw()
        long = {**fields, "max_tokens": self._long, "stream": True}
        async with client.stream("POST", "/v1/completions", json=long) as response:
            if response.status_code != 200:
                await response.aread()
            if self._status(response, *self._statuses_of(model)):
                async for _ in response.aiter_lines():
                    return

    async def _left_at_once(self, client: httpx.AsyncClient) -> None:
        _, _, fields = self._draw()
        with contextlib.suppress(httpx.TimeoutException):
            seconds = self._random.uniform(0.001, 0.05)
            await client.post("/v1/completions", json={**fields, "max_tokens": self._long}, timeout=seconds)

    async def _malformed(self, client: httpx.AsyncClient) -> None:
        body, status = self._random.choice(MALFORMED)
        response = await client.post("/v1/completions", content=body, headers=JSON)
        self._status(response, status)
        if set(response.json()["error"]) != {"message", "type", "param", "code"}:
            self._fail(f"not OpenAI's shape: {response.text}")

    async def _exchange(self, client: httpx.AsyncClient) -> None:
        """New weights under an old name."""
        async with self._changing:
            self._swapped.replace()
            await self._change(client, "load", self._swapped.name)
            self._swapped.stable = len(self._swapped.history) - 1

    async def _unload_and_load(self, client: httpx.AsyncClient) -> None:
        async with self._changing:
            await self._change(client, "unload", self._spare)
            await self._change(client, "load", self._spare)

    async def _change(self, client: httpx.AsyncClient, verb: str, name: str) -> None:
        """Tries again while all places in host memory are taken."""
        while True:
            path = f"/v1/{verb}_lora_adapter"
            response = await client.post(path, json={"lora_name": name}, headers=self._admin)
            self._status(response, 200, 429)
            if response.status_code != 429:
                return
            await asyncio.sleep(0.2)


def leaks(url: str, compilations: int) -> list[str]:
    """What the server still holds ten seconds after the last request; programs compiled since count too."""
    for _ in range(100):
        engine = httpx.get(f"{url}/status").json()["engine"]
        busy = [slot for slot in engine["slots"] if slot["state"] != "free"]
        used = [adapter["name"] for adapter in engine["adapters"] if adapter["users"]]
        if not busy and not engine["waiting"] and not used:
            break
        time.sleep(0.1)
    compiled = engine["counters"]["compilations"] - compilations
    found = {
        "busy slots": busy,
        "waiting requests": engine["waiting"],
        "adapters in use": used,
        "compilations": compiled,
    }
    return [f"{what}: {value}" for what, value in found.items() if value]
