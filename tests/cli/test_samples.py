"""Answers to rows: each compared with its own turn, as long as that is, within the model's positions."""

import numpy as np
import pytest

from qlora_jax.data import Encoded, load_tokenizer
from qlora_jax.generation import Generator
from qlora_jax.run import groups, samples
from qlora_jax.run.samples import Answerer, turns_of
from tests.cli.tiny import SPECIALS, write_tokenizer

EOS, END = "</s>", "<|end|>"  # END ends turns, and is not the tokenizer's eos


@pytest.fixture(autouse=True)
def nothing_was_said():
    samples.announce.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    return tokenizer


@pytest.fixture
def document(tokenizer):
    """`document((text, scored), …)`: the parts' ids one after the other."""

    def make(*parts: tuple[str, bool]) -> Encoded:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
        scored = [[yes] * len(one) for one, (_, yes) in zip(ids, parts, strict=True)]
        return Encoded(ids=np.array(sum(ids, []), np.int32), scored=np.array(sum(scored, [])))

    return make


@pytest.fixture
def answerer(tokenizer, monkeypatch):
    """`answerer(knows)`: a model that knows what follows a prompt, by text, and stays silent after any other."""
    asked = []

    def make(knows: dict[str, str], positions: int = 1000) -> Answerer:
        def generate(self, prompts, *, max_new_tokens):
            asked.extend(zip(map(len, prompts), max_new_tokens, strict=True))
            said = [tokenizer(knows.get(tokenizer.decode(p), EOS), add_special_tokens=False) for p in prompts]
            rows = [one["input_ids"][:limit] for one, limit in zip(said, max_new_tokens, strict=True)]
            return [self._until_stop(row) for row in rows]

        monkeypatch.setattr(Generator, "generate", generate)
        monkeypatch.setattr(samples, "with_table_on_device", lambda state: state)
        parts = type("Parts", (), dict(graphdef=None, trained=None, base=None))
        made = Answerer(parts, tokenizer, stop_ids=[tokenizer.eos_token_id], positions=positions)
        made.asked_for = asked
        return made

    return make


TWO_TURNS = (("hi?", False), ("yes" + END, True), ("\nand?", False), ("no" + END, True), ("\n", False))


def test_the_turns_of_a_row(document, tokenizer):
    first, second = turns_of(document(*TWO_TURNS))
    assert tokenizer.decode(first.prompt) == "hi?" and tokenizer.decode(first.expected) == "yes" + END
    assert tokenizer.decode(second.prompt) == f"hi?yes{END}\nand?" and tokenizer.decode(second.expected) == "no" + END
    assert not first.last and not second.last
    [whole] = turns_of(document(("a", False), ("b" + EOS, True)))
    assert whole.last


@pytest.mark.parametrize(
    "first, second, share",
    [
        ("yes" + END, "no" + END, 1.0),
        (f" yes\n{END}", "no" + END, 1.0),  # white space around it
        ("yes" + END, "yes" + END, 0.5),
        (f"yes{END}\nand?no{END}", "no" + END, 1.0),  # what comes after the turn's end is not its answer
        ("yesno" + END, "no" + END, 0.5),
        ("ye" + END, "no" + END, 0.5),
        ("yes, of course, and more of that" + END, "n" + END, 0.0),
        ("yes" + EOS, "no" + EOS, 1.0),
    ],
)
def test_each_answer_is_compared_with_its_own_turn(document, answerer, first, second, share):
    knows = {"hi?": first, f"hi?yes{END}\nand?": second}
    assert answerer(knows).exact_match([document(*TWO_TURNS)]) == {"exact_match": share}


def test_long_answers_are_heard_to_their_end(document, answerer):
    long = "word " * 60
    row = document(("tell", False), (long + EOS, True))
    assert answerer({"tell": long + EOS}).exact_match([row]) == {"exact_match": 1.0}
    assert answerer({"tell": long + "more" + EOS}).exact_match([row]) == {"exact_match": 0.0}


def test_a_turn_that_ends_with_text(document, answerer):
    """A template whose markers are no tokens of the tokenizer."""
    row = document(("q", False), ("a|end|", True), ("q", False), ("b|end|" + EOS, True))
    knows = {"q": "a|end|qq|end|q", "qa|end|q": "b|end|" + EOS}
    assert answerer(knows).exact_match([row]) == {"exact_match": 1.0}
    assert answerer(knows | {"q": "a|en" + EOS}).exact_match([row]) == {"exact_match": 0.5}


def test_a_token_that_stands_inside_answers_ends_none(document, answerer):
    row = document(("q", False), ("a" + END, True), ("q", False), (f"b{END}c" + EOS, True))
    knows = {"q": f"a{END}", f"qa{END}q": f"b{END}c" + EOS}
    assert answerer(knows).exact_match([row])["exact_match"] >= 0.5


def test_an_answer_that_is_cut_is_not_compared(document, answerer, caplog):
    rows = [document(("q", False), ("abc", True)), document(("r", False), ("d" + EOS, True))]
    assert answerer({"q": "abc", "r": "d" + EOS}).exact_match(rows) == {"exact_match": 1.0}
    assert caplog.messages == ["1 of 2 answers are cut in the rows, and not compared exactly"]
    assert answerer({}).exact_match(rows[:1]) == {}


def test_no_text_is_longer_than_the_model_was_made_for(document, answerer, caplog):
    rows = [document(("p" * n, False), ("a" * m + EOS, True)) for n, m in ((10, 5), (25, 4), (3, 60), (31, 2), (40, 2))]
    model = answerer({}, positions=32)
    model.exact_match(rows)
    assert model.asked_for and all(prompt + new <= 32 for prompt, new in model.asked_for)
    assert caplog.messages == ["3 of 5 answers are shortened: the model's 32 positions end there"]
    model.asked_for.clear()
    said = model.samples(rows)
    assert len(said) == 5 and all(prompt + new <= 32 for prompt, new in model.asked_for)
    assert caplog.messages[1:] == ["5 of 5 answers are shortened: the model's 32 positions end there"]


def test_samples_are_of_the_first_turn(document, answerer):
    rows = [document(*TWO_TURNS), document(("q", False), ("a" + EOS, True))]
    model = answerer({"hi?": f"maybe{END}", "q": "b" + EOS})
    assert model.samples(rows) == ["maybe", "b"]
    assert [(model.asked(row), model.expected(row)) for row in rows] == [("hi?", "yes"), ("q", "a")]


def test_many_answers_keep_their_places(document, answerer):
    """They are asked for in groups of few shapes."""
    prompts = [f"{i}" + "p" * (i * 37 % 90) for i in range(150)]
    rows = [document((prompt, False), ("?" + EOS, True)) for prompt in prompts]
    model = answerer({prompt: f"answer {i}{EOS}" for i, prompt in enumerate(prompts)})
    assert model.samples(rows) == [f"answer {i}" for i in range(150)]
    assert len(model.asked_for) == 3 * groups.BATCH


@pytest.mark.parametrize("prompt, new, rows", [(20, 32, 64), (500, 64, 16), (4000, 512, 2), (30_000, 512, 1)])
def test_fewer_long_texts_are_written_at_once(prompt, new, rows):
    assert groups.rows_at_once(prompt, new) == rows


def test_the_special_tokens_are_those_of_the_tests():
    assert SPECIALS[1] == EOS
