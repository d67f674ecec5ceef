"""The engine answers each request as its adapter does alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generation import Generator, Sampling
from qlora_jax.io.peft import read_adapter
from qlora_jax.lora import LoRA
from qlora_jax.quant.nf4 import dequantize
from qlora_jax.serve.request import Refused, Token, TooLong, UnknownModel
from tests.serve.parts import ADAPTERS, answer, ask, loaded_base, prompt, stop_within, write_random_adapter


def test_a_mixed_batch_equals_each_request_alone(engine, alone_answers):
    """Eight adapters and the base on four rows and three places of the device: everything waits, and is evicted."""
    names = [None, *ADAPTERS]
    asked = {name: ask(engine, prompt(seed, 5 + 3 * seed), name, new=10) for seed, name in enumerate(names)}
    for seed, name in enumerate(names):
        assert asked[name].finished().reason == "length"
        assert asked[name].ids == alone_answers(name, prompt(seed, 5 + 3 * seed), 10), name
    assert len({tuple(answer(engine, prompt(1), name, new=10)) for name in names}) == len(names)
    assert engine.view().counters["evictions"] > 0


def test_an_adapter_served_is_the_adapter_merged(engine, base, adapters):
    """Merged into the NF4 weights that it is served with."""
    adapter, loaded = read_adapter(adapters / "all3"), loaded_base(base)
    graphdef, state = nnx.split(loaded.model)
    model = nnx.merge(graphdef, state)
    for kind, names in {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj")}.items():
        for name in names:
            _merge(getattr(getattr(model.layers, kind), name), f"{kind}.{name}", adapter)
    _merge(model.layers.mlp.down_proj, "mlp.down_proj", adapter)
    generator = Generator(*nnx.split(model), stop_ids=())
    assert [answer(engine, prompt(3), "all3")] == generator.generate([prompt(3)], max_new_tokens=8)


def _merge(linear, name, adapter):
    packed, weights = linear.weight.get_value(), []
    for layer in range(packed.leading[0]):
        pair = adapter.weights[f"model.layers.{layer}.{name}"]
        weights.append(LoRA.merge(np.asarray(dequantize(packed[layer])), pair, adapter.lora.alpha / adapter.lora.rank))
    linear.weight = type(linear.weight)(jnp.asarray(np.stack(weights)))
    linear.lora = None


def test_a_zero_adapter_is_the_base(engine, base, adapters, alone_answers):
    write_random_adapter(adapters / "zero", base, 99, size=0.0, rank=4, targets="all-linear")
    asked = {seed: ask(engine, prompt(seed), name) for seed, name in enumerate(["zero", None, "all5"])}
    for seed, name in enumerate([None, None, "all5"]):
        assert asked[seed].finished().reason == "length"
        assert asked[seed].ids == alone_answers(name, prompt(seed))


def test_a_seed_draws_the_same_tokens_whatever_else_is_served(engine, alone_answers):
    """And those that Generator draws."""
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.9)
    alone = alone_answers("qv2", prompt(1), 12, sampling=sampling, seed=7)
    assert answer(engine, prompt(1), "qv2", new=12, sampling=sampling, seed=7) == alone
    others = [ask(engine, prompt(i), None, new=12, sampling=Sampling(temperature=2.0), seed=i) for i in range(3)]
    assert answer(engine, prompt(1), "qv2", new=12, sampling=sampling, seed=7) == alone
    assert answer(engine, prompt(1), "qv2", new=12, sampling=sampling, seed=8) != alone
    assert all(other.finished().reason == "length" for other in others)


def test_log_probabilities_are_the_models_before_temperature(engine, base):
    sampling = Sampling(temperature=0.5)
    heard = ask(engine, prompt(2), new=5, sampling=sampling, seed=3, top_logprobs=4)
    heard.finished()
    expected = log_softmax_of_base(base, prompt(2) + heard.ids)
    for place, token in enumerate(heard.tokens, start=len(prompt(2)) - 1):
        assert_scored(token, expected[place], 4)


def log_softmax_of_base(base, ids) -> np.ndarray:
    model = loaded_base(base).model
    for part in (*vars(model.layers.self_attn).values(), *vars(model.layers.mlp).values()):
        if hasattr(part, "lora"):
            part.lora = None
    return np.asarray(jax.nn.log_softmax(model(jnp.asarray([ids]))[0]))


def assert_scored(token: Token, expected: np.ndarray, count: int) -> None:
    assert token.logprob == pytest.approx(expected[token.id], abs=1e-4)
    best = np.argsort(-expected)[:count]
    assert [id for id, _ in token.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in token.top], expected[best], atol=1e-4)


@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_a_prompts_own_tokens_are_scored(engine, base, length, new):
    heard = ask(engine, prompt(4, length), new=new, score_prompt=True, top_logprobs=2)
    assert heard.finished().reason == "length"
    assert [token.id for token in heard.scored] == prompt(4, length)
    assert len(heard.ids) == new
    expected = log_softmax_of_base(base, prompt(4, length) + heard.ids)
    assert heard.scored[0] == Token(prompt(4, length)[0])
    for place, token in enumerate([*heard.scored[1:], *heard.tokens]):
        assert_scored(token, expected[place], 2)


def test_no_log_probabilities_where_none_are_asked_for(engine):
    """Beside a request that asks for them."""
    other = ask(engine, prompt(1), new=20, top_logprobs=1)
    heard = ask(engine, prompt(2), new=4)
    heard.finished(), other.finished()
    assert [(token.logprob, token.top) for token in heard.tokens] == [(None, ())] * 4
    assert all(token.logprob < 0 and len(token.top) == 1 for token in other.tokens)


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(engine, alone_answers, monkeypatch):
    expected = alone_answers("all3", prompt(1), 8)
    stop = stop_within(engine, expected, monkeypatch)
    heard = ask(engine, prompt(1), "all3", new=8)
    assert heard.finished().reason == "stop"
    assert heard.ids == expected[: expected.index(stop)]


def test_a_prompt_that_begins_alike_is_read_from_where_it_differs(engine, alone_answers):
    """With the same adapter only: another one's keys and values are other numbers."""
    text = prompt(6, 20)
    first = ask(engine, text, "qv2")
    assert first.finished().cached == 0
    longer = text + first.ids[:3] + prompt(7, 4)
    again = ask(engine, longer, "qv2")
    assert again.finished().cached == 23
    assert again.ids == alone_answers("qv2", longer)
    shorter = text[:9] + prompt(8, 5)
    branched = ask(engine, shorter, "qv2")
    assert branched.finished().cached == 9
    assert branched.ids == alone_answers("qv2", shorter)
    other = ask(engine, shorter, "q1")
    assert other.finished().cached == 0
    assert other.ids == alone_answers("q1", shorter)
    whole = ask(engine, shorter, "q1")  # one token is read: what it predicts is not kept
    assert whole.finished().cached == 13
    assert whole.ids == other.ids
    kept = ask(engine, shorter + branched.ids[:4] + [9], "qv2")  # what others wrote meanwhile went elsewhere
    assert kept.finished().cached == 18
    assert kept.ids == alone_answers("qv2", shorter + branched.ids[:4] + [9])


def test_a_text_fills_its_row_to_the_last_place(engine, alone_answers):
    for length in (40, 63):
        expected = alone_answers("o8", prompt(9, length), 24)[: 64 - length]
        assert answer(engine, prompt(9, length), "o8", new=64 - length) == expected


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(prompt=[]), ValueError, "at least one token"),
        (dict(prompt=[1, 258]), ValueError, "258 is no token"),
        (dict(prompt=[1, -1]), ValueError, "-1 is no token"),
        (dict(new=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(top_logprobs=21), ValueError, "from 0 to 20, got 21"),
        (dict(prompt=[1] * 60, new=5), TooLong, "60 tokens and 5 more are asked for, 65 together: at most 64"),
        (dict(adapter="nobody"), UnknownModel, "no adapter 'nobody' is served: these are: base, all3"),
        (dict(adapter="../adapters/q1"), UnknownModel, "no adapter '../adapters/q1' is served"),
        (dict(adapter="q1\0"), UnknownModel, r"no adapter 'q1\\x00' is served"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(engine, options, error, words):
    given = dict(prompt=prompt(1), adapter=None, new=4) | options
    with pytest.raises(error, match=words):
        ask(engine, given.pop("prompt"), given.pop("adapter"), given.pop("new"), **given)


def test_what_is_served(engine):
    assert engine.models()[:3] == [("base", None), ("all3", "base"), ("all5", "base")]
    with pytest.raises(ValueError, match="'base' is the base"):
        engine.load_adapter("base")
    assert issubclass(UnknownModel, Refused)
