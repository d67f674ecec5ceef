"""Every family generates, and serves several adapters at once, as its model does alone."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generation import Generator
from qlora_jax.serve import open_engine
from tests.families import ours
from tests.families.checkpoints import DOCUMENTS, STEPS
from tests.families.table import families
from tests.serve.parts import ask

pytest.importorskip("torch")
NEW = 6
# Prompt and new tokens are the first document of the reference's packed row: frequencies may follow a text's length.
PROMPT = DOCUMENTS[0] - NEW


def every(check: str):
    return pytest.mark.parametrize("subject", families(check), indirect=True, scope="session")


@every("greedy")
def test_generating_is_greedy(subject, measured):
    generator = Generator(*nnx.split(subject.plain), stop_ids=())
    found = generator.generate(subject.reference.tokens.tolist(), max_new_tokens=STEPS)
    assert found == subject.reference.greedy.tolist()
    measured("")


@pytest.fixture
def engine(subject):
    """An engine of the family, with two adapters beside the base."""
    folder = subject.scratch / "served"
    for seed, name in enumerate(("one", "other"), start=1):
        subject.random_adapter(f"served/{name}", seed, targets=subject.projections)
    sizes = dict(slots=3, max_loras=2, max_rank=2, max_length=32, queue=4, host_adapters=2)
    engine = open_engine(subject.folder, folder, base_name="base", quant="none", dtype="fp32", stop_ids=(), **sizes)
    engine.start()
    yield engine
    engine.close()


@every("served")
def test_adapters_in_one_batch_are_each_alone(subject, engine, measured):
    """Three texts at once: the log probabilities of a prompt and of what is drawn after it are those of each model."""
    prompt = subject.reference.tokens[0, :PROMPT].tolist()
    adapters = {None: None, **{name: subject.scratch / "served" / name for name in ("one", "other")}}
    heard = {name: ask(engine, prompt, name, new=NEW, score_prompt=True, top_logprobs=0) for name in adapters}
    worst, drawn = 0.0, {}
    for name, adapter in adapters.items():
        assert heard[name].finished().reason == "length"
        tokens = subject.reference.tokens.copy()
        tokens[0, PROMPT : PROMPT + NEW] = heard[name].ids
        logits = ours.logits(
            ours.load(subject.folder, adapter=adapter).model, subject.reference._replace(tokens=tokens)
        )
        places = np.arange(DOCUMENTS[0] - 1)
        expected = np.asarray(jax.nn.log_softmax(logits[2, places]))[places, tokens[0, 1 : DOCUMENTS[0]]]
        found = np.asarray([token.logprob for token in (*heard[name].scored[1:], *heard[name].tokens)])
        worst, drawn[name] = max(worst, np.abs(found - expected).max()), found[-NEW:]
    # Another one's adapter would be noticed.
    for one, other in itertools.combinations(drawn.values(), 2):
        assert np.median(np.abs(one - other)) > 10 * ours.CLOSE
    assert worst < ours.CLOSE
    measured(worst)
