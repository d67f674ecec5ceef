"""A small base with adapters of different ranks and targets, and what each of them answers alone."""

import functools
import threading
from pathlib import Path

import numpy as np

from benchmarks import random_adapters
from qlora_jax.config import QuantSection
from qlora_jax.generation import Generator
from qlora_jax.io.hf import LoadedModel, load_model
from qlora_jax.quant.rules import rules_for
from qlora_jax.serve import open_engine
from qlora_jax.serve.request import Event, Finished, PromptScored, Request, Token

# Different ranks and targets; rsLoRA, and ranks that differ from module to module, among them.
ADAPTERS = {
    "q1": dict(rank=1, targets=("q_proj",)),
    "qv2": dict(rank=2, targets=("q_proj", "v_proj")),
    "all3": dict(rank=3, targets="all-linear"),
    "mlp4": dict(rank=4, targets=("gate_proj", "up_proj", "down_proj"), alpha=2.0),
    "all5": dict(rank=5, targets="all-linear", variant="rslora"),
    "o8": dict(rank=8, targets=("o_proj",), dropout=0.1),
    "one-layer": dict(rank=6, targets=("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")),
    "mixed-ranks": dict(rank=2, targets="all-linear", rank_pattern={"q_proj": 7, "down_proj": 12}),
}
LENGTH, RANK = 64, 12


@functools.cache
def loaded_base(base: Path) -> LoadedModel:
    """The base in fp32 on NF4 weights. Adapters come and go; the arrays stay."""
    return load_model(base, dtype="float32", rules=rules_for("nf4", QuantSection()))


def write_random_adapter(folder: Path, base: Path, seed: int, **options) -> Path:
    """An adapter of the base with random weights."""
    return random_adapters.write_random_adapter(folder, loaded_base(base), seed, **options)


def alone(base: Path, adapter: Path | None) -> Generator:
    """The base with this one adapter, as generate.py has it."""
    return random_adapters.alone(loaded_base(base), adapter, RANK)


def make_engine(base: Path, adapters: Path | None, **options):
    """An engine in fp32 on NF4 weights, small enough to be compiled for a test."""
    sizes = dict(slots=4, max_loras=3, max_rank=RANK, max_length=LENGTH, queue=32, host_adapters=8)
    return open_engine(
        base, adapters, base_name="base", quant="nf4", dtype="fp32", **{"stop_ids": [], **sizes, **options}
    )


class Heard:
    """A listener that keeps what it hears, and can be waited for."""

    def __init__(self):
        self.events: list[Event] = []
        self.changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait(self, condition, seconds: float = 60.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), seconds), self.events

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def scored(self) -> list[Token]:
        return [token for event in self.events if isinstance(event, PromptScored) for token in event.tokens]

    @property
    def end(self) -> Finished | None:
        return next((event for event in self.events if isinstance(event, Finished)), None)

    def finished(self) -> Finished:
        self.wait(lambda heard: heard.end)
        assert isinstance(self.events[-1], Finished)
        assert self.end
        return self.end


def ask(engine, prompt, adapter=None, new=8, **options) -> Heard:
    """Submits a request; does not wait."""
    heard = Heard()
    engine.submit(Request(prompt=tuple(prompt), adapter=adapter, max_new_tokens=new, **options), heard)
    return heard


def answer(engine, prompt, adapter=None, new=8, **options) -> list[int]:
    """The new tokens of a request that ends as it should."""
    heard = ask(engine, prompt, adapter, new, **options)
    assert heard.finished().reason == "length", heard.end
    return heard.ids


def prompt(seed: int, length: int = 12) -> list[int]:
    """Random ids of the small model."""
    return np.random.default_rng(seed).integers(2, 250, length).tolist()


def stop_within(engine, ids: list[int], monkeypatch) -> int:
    """Makes a token of an answer, not its first, the engine's stop token, and returns it."""
    stop = next(token for token in ids if token != ids[0])
    monkeypatch.setattr(engine._scheduler, "stop_ids", frozenset([stop]))
    return stop
