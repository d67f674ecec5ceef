"""The official client, unchanged."""

import pytest

from qlora_jax.serve.request import Request
from tests.serve.http.fake import BASE
from tests.serve.http.live import serving

openai = pytest.importorskip("openai", reason="the openai package is not installed")
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def official(service):
    with (
        serving(service, api_key="sesame") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as client,
    ):
        yield client


def test_models(official):
    assert [model.id for model in official.models.list()] == [BASE, "cook", "poet"]
    assert official.models.retrieve("cook").parent == BASE


def test_completions(official):
    answer = official.completions.create(model="cook", prompt="Hi", max_tokens=30, temperature=0, logprobs=1, echo=True)
    assert answer.choices[0].text == "Hi stir – and 🍳 fry"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.token_logprobs[:2] == [None, -1.0]
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    parts = official.completions.create(model="cook", prompt="Hi", stop=["fry"], stream=True, extra_body={"top_k": 5})
    assert "".join(part.choices[0].text for part in parts) == " stir – and 🍳 "


def test_chat(official):
    answer = official.chat.completions.create(
        model="poet", messages=HI, n=2, seed=1, max_completion_tokens=30, logprobs=True, top_logprobs=1, user="me"
    )
    assert [choice.message.content for choice in answer.choices] == [" rose\nis a rose"] * 2
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == " ro"
    again = [*HI, answer.choices[0].message, {"role": "user", "content": "Go on"}]
    assert official.chat.completions.create(model="poet", messages=again).choices[0].finish_reason == "stop"


def test_chat_stream(official):
    parts = official.chat.completions.create(
        model="poet", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    parts = list(parts)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == " rose\nis a rose"
    assert parts[-1].usage.completion_tokens == 7
    with official.chat.completions.stream(model="poet", messages=HI) as stream:
        assert stream.get_final_completion().choices[0].message.content == " rose\nis a rose"


def test_errors_are_the_clients_own(official, engine):
    with pytest.raises(openai.NotFoundError, match="served are demo-base, cook, poet") as caught:
        official.completions.create(model="nope", prompt="Hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        official.chat.completions.create(model=BASE, messages=HI, temperature=3)
    with pytest.raises(openai.AuthenticationError):
        official.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIError, match="the adapter is broken"):
        list(official.completions.create(model="broken", prompt="Hi", stream=True))
    engine.slots, engine.queue = 0, 1
    engine.submit(Request(prompt=(1,), max_new_tokens=1), lambda event: None)
    with pytest.raises(openai.RateLimitError) as refused:
        official.completions.create(model=BASE, prompt="Hi")
    assert refused.value.response.headers["retry-after"] == "1"


def test_the_asynchronous_client_stops_a_stream(service, engine):
    import asyncio

    engine.scripts["poet"] = list(engine.scripts["poet"]) * 20
    engine.pace = 0.01

    async def first_part(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.completions.create(model="poet", prompt="Hi", stream=True, max_tokens=140)
            async with stream:
                return (await anext(aiter(stream))).choices[0].text

    with serving(service) as url:
        assert asyncio.run(first_part(url)) == " ro"
        assert engine.is_idle()
    assert engine.tickets[0].cancelled
