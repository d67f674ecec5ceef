"""The decode loop: a prompt is continued as it is alone, whatever stands beside it."""

import jax
import pytest
from flax import nnx

from qlora_jax.generation import Generator
from qlora_jax.generation.decode import _padded
from qlora_jax.io.hf import random_model
from tests import tiny_config

CONFIG = tiny_config.windowed(0, 0)
LONG, SHORT, OTHER = [5, 6, 7, 8, 9], [11, 3], [2, 90]


@pytest.fixture(scope="module")
def generator():
    graphdef, state = nnx.split(random_model(CONFIG, 0, dtype="float32").model)
    return Generator(graphdef, state, stop_ids=())


def test_prompts_of_any_lengths_side_by_side(generator):
    alone = [generator.generate([prompt], max_new_tokens=6)[0] for prompt in (LONG, SHORT, OTHER)]
    assert len({tuple(text) for text in alone}) == 3
    assert generator.generate([LONG, SHORT, OTHER], max_new_tokens=6) == alone
    assert generator.generate([SHORT, OTHER], max_new_tokens=6) == alone[1:]


def test_equal_lengths_are_one_number():
    assert jax.numpy.ndim(_padded([SHORT, OTHER])[1]) == 0
    assert _padded([LONG, SHORT])[1].tolist() == [5, 2]


def test_each_has_a_limit_of_its_own(generator):
    alone = [generator.generate([prompt], max_new_tokens=6)[0] for prompt in (LONG, SHORT, OTHER)]
    for limits in ([6, 1, 3], [1, 1, 1], [2, 6, 6]):
        expected = [text[:limit] for text, limit in zip(alone, limits, strict=True)]
        assert generator.generate([LONG, SHORT, OTHER], max_new_tokens=limits) == expected
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generator.generate([LONG, SHORT], max_new_tokens=[3, 0])
