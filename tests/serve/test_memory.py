"""The device's memory is counted before it is taken."""

import jax
import pytest

from qlora_jax.serve import memory
from tests.serve.parts import make_engine


def test_what_is_counted_is_what_is_taken(engine):
    runner = engine._scheduler.runner
    parts = (runner.base, runner.texts, runner.stacks)
    assert runner.needs == tuple(sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for part in parts)


def test_what_has_no_room_is_refused_before_it_is_taken(base, adapters, engine, monkeypatch):
    needs = engine._scheduler.runner.needs
    monkeypatch.setattr(memory, "device_memory", lambda: sum(needs))
    make_engine(base, adapters).close()
    monkeypatch.setattr(memory, "device_memory", lambda: sum(needs) - 1)
    monkeypatch.setattr("qlora_jax.serve.runner.Runner.reset", lambda runner: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB .base 0.* texts 0.* adapters 0.*: lower slots or max_length"):
        make_engine(base, adapters)
