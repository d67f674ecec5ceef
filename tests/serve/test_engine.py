"""The engine answers each request as its adapter does alone."""

from tests.serve.parts import ADAPTERS, answer, ask, prompt


def test_a_mixed_batch_equals_each_request_alone(engine, alone_answers):
    """Eight adapters and the base on four rows and three places of the device: everything waits, and is evicted."""
    names = [None, *ADAPTERS]
    asked = {name: ask(engine, prompt(seed, 5 + 3 * seed), name, new=10) for seed, name in enumerate(names)}
    for seed, name in enumerate(names):
        assert asked[name].finished().reason == "length"
        assert asked[name].ids == alone_answers(name, prompt(seed, 5 + 3 * seed), 10), name
    answers = {tuple(answer(engine, prompt(1), name, new=10)) for name in names}
    assert len(answers) >= len(names) - 1  # they do differ
