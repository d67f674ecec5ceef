"""The server over the real engine with a small model: text, scores, adapters, traffic."""

import asyncio
import json
import shutil

import httpx
import numpy as np
import pytest

from benchmarks.soak.answers import answers_alone
from benchmarks.soak.traffic import NEW_TOKENS, Swapped, Traffic, leaks
from qlora_jax.data import load_tokenizer
from qlora_jax.io.peft import WEIGHTS
from qlora_jax.serve.http.service import Service
from tests.cli.tiny import VOCABULARY
from tests.serve.http.live import serving
from tests.serve.parts import ADAPTERS, LENGTH, RANK, loaded_base, make_engine, prompt, write_random_adapter

KEY = "root"
# Different ranks and targets, more than the engine holds on the device.
SERVED = ("q1", "all3", "o8", "mixed-ranks")
PROMPTS = [prompt(seed, 4 + 9 * seed) for seed in range(3)]


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(str(base))


@pytest.fixture(scope="module")
def folder(adapters, base, tmp_path_factory):
    """The adapters, in a folder that may be changed, and a second content for one of them."""
    folder = tmp_path_factory.mktemp("changing")
    for name in SERVED:
        shutil.copytree(adapters / name, folder / "adapters" / name)
    write_random_adapter(folder / "other", base, 50, **ADAPTERS["all3"])
    (folder / "secret").mkdir()
    shutil.copytree(adapters / "q1", folder / "secret" / "outside")
    (folder / "adapters" / "link").symlink_to(folder / "secret" / "outside")
    return folder


@pytest.fixture(scope="module")
def engine(base, folder, tokenizer):
    engine = make_engine(base, folder / "adapters", stop_ids=[tokenizer.eos_token_id])
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine, tokenizer):
    service = Service(engine, tokenizer, base="base", max_length=LENGTH, vocabulary=VOCABULARY)
    with serving(service, admin_key=KEY) as url:
        yield url


@pytest.fixture(scope="module")
def expected(base, folder, tokenizer):
    """What each model says alone, after PROMPTS, by the way that generate.py takes."""
    models = {"base": None} | {name: folder / "adapters" / name for name in SERVED}
    models["all3#0"], models["all3#1"] = models.pop("all3"), folder / "other"
    return answers_alone(loaded_base(base), models, PROMPTS, tokenizer, new=NEW_TOKENS, rank=RANK)


def test_every_adapter_answers_as_alone(client, expected):
    for name in expected:
        if name == "all3#1":
            continue
        body = {"model": name.partition("#")[0], "prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert [choice["text"] for choice in answer["choices"]] == expected[name], name
    assert len({tuple(texts) for texts in expected.values()}) >= len(expected) - 1


def test_scores_are_those_of_the_reference(client, base):
    """As lm-evaluation-harness asks: one new token, whose entry it leaves out; held against transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids, context = PROMPTS[2], 5
    body = {"model": "base", "prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    [choice] = client.post("/v1/completions", json={**body, "seed": 1234}).json()["choices"]
    scores = choice["logprobs"]
    assert len(scores["token_logprobs"]) == len(ids) + 1
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _put_nf4_weights(model)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    reference = [logits[i - 1, token].item() for i, token in enumerate(ids) if i >= context]
    np.testing.assert_allclose(scores["token_logprobs"][context:-1], reference, atol=2e-4)
    greedy = [token == logits[i - 1].argmax().item() for i, token in enumerate(ids) if i > 0]
    pairs = list(zip(scores["token_logprobs"], scores["top_logprobs"], strict=True))
    found = [own == max(top.values()) for own, top in pairs[1:-1]]
    assert found == greedy
    assert pairs[-1][0] == max(pairs[-1][1].values())  # drawn greedily


def _put_nf4_weights(model):
    """The projections as bitsandbytes' NF4 stores them, dequantized."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            packed, state = quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(packed, state)


def test_seeds_repeat_and_differ(client):
    def say(seed, **more):
        body = {"model": "o8", "prompt": PROMPTS[1], "max_tokens": 12, "temperature": 1.5, "seed": seed, **more}
        return [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]

    first = say(7, n=3)
    assert len(set(first)) == 3
    assert [say(7)[0], say(8)[0], say(9)[0]] == first
    assert say(2**62) != say(2**62 + 2**40)  # all of the seed counts


@pytest.mark.parametrize(
    "name",
    [
        "../secret/outside",
        "..",
        ".",
        "/etc/passwd",
        "link",
        "q1/",
        "q1\0",
        "ｑ1",
        "q1\u200b",
        "Q1",
        "adapter_config.json",
    ],
)
def test_names_are_names(client, name):
    response = client.post("/v1/completions", json={"model": name, "prompt": "a"})
    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] == "model_not_found"
    for body in ({"lora_name": name}, {"lora_name": "new", "lora_path": name}):
        response = client.post("/v1/load_lora_adapter", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["param"] == "lora_name"
    assert "passwd" not in client.get("/v1/models").text


def test_a_poisoned_adapter_is_refused(client, folder):
    place = folder / "adapters" / "poisoned"
    shutil.copytree(folder / "adapters" / "o8", place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "r": 500}))
    response = client.post("/v1/completions", json={"model": "poisoned", "prompt": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "model_not_servable"
    response = client.post(
        "/v1/load_lora_adapter", json={"lora_name": "poisoned"}, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert response.status_code == 400
    shutil.rmtree(place)


def test_too_long_a_prompt_states_both_lengths(client):
    message = client.post("/v1/completions", json={"model": "q1", "prompt": "a" * 70}).json()["error"]["message"]
    assert "70 tokens" in message and "64" in message


def test_traffic(url, engine, folder, expected, tmp_path):
    """Three hundred of what benchmarks/server_soak.py sends ten thousand of."""
    first = shutil.copyfile(folder / "adapters" / "all3" / WEIGHTS, tmp_path / "first")
    swapped = Swapped("all3", folder / "adapters" / "all3" / WEIGHTS, (first, folder / "other" / WEIGHTS))
    compiled = engine.view().counters["compilations"]
    traffic = Traffic(url, KEY, PROMPTS, expected, swapped=swapped, spare="o8", long=LENGTH - len(PROMPTS[-1]))
    report = asyncio.run(traffic.run(300, at_once=8))
    assert report.failures == []
    assert leaks(url, compiled) == []
    assert len(report.kinds) == 8 and swapped.stable > 0
    assert set(report.statuses) <= {200, 400, 404, 413, 429}


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
