"""Prometheus metrics: of the answers, counted here, and of the engine, read when they are asked for."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The server's counters. Adapters are no labels: there may be thousands.

    Args:
      view: gives the engine's snapshot.
    """

    def __init__(self, view: Callable[[], Any]):
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, namespace="qlora_jax", registry=self._registry)
        histogram = functools.partial(Histogram, namespace="qlora_jax", registry=self._registry, buckets=SECONDS)
        self.answers = counter("answers", "Answers by path and HTTP status.", ["path", "status"])
        self.tokens = counter("tokens", "Tokens: prompt, cached (of those) and generated.", ["kind"])
        self.first_token = histogram("first_token_seconds", "From request to first token.")
        self.whole_answer = histogram("answer_seconds", "From request to last token.")
        self._registry.register(_EngineCollector(view))

    def count(self, usage: dict[str, Any], seconds: float) -> None:
        """An answer that is complete."""
        self.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self.tokens.labels("cached").inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.tokens.labels("generated").inc(usage["completion_tokens"])
        self.whole_answer.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, view: Callable[[], Any]):
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view()
        busy = sum(slot.state != "free" for slot in view.slots)
        slots = GaugeMetricFamily("qlora_jax_slots", "Slots of the decode batch.", labels=["state"])
        slots.add_metric(["busy"], busy)
        slots.add_metric(["free"], len(view.slots) - busy)
        yield slots
        yield GaugeMetricFamily("qlora_jax_waiting", "Requests that wait for a slot.", view.waiting)
        adapters = GaugeMetricFamily("qlora_jax_adapters", "Adapters by where they are.", labels=["where"])
        for where in ("disk", "host", "device"):
            adapters.add_metric([where], sum(adapter.where == where for adapter in view.adapters))
        yield adapters
        for name, value in view.counters.items():
            yield CounterMetricFamily(f"qlora_jax_engine_{name}", f"The engine's {name}.", value)
