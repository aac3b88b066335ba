"""Measurements of a server: for Prometheus at `/metrics`, and the last seconds for the page at `/`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from longwave.engine import Engine, Event

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAUGES = {
    "waiting": ("requests_waiting", "Requests in the queue."),
    "running": ("requests_running", "Requests that advance together: the batch."),
    "state_bytes": ("state_bytes", "Bytes that hold the states of requests."),
    "prefixes": ("prefixes", "Beginnings of requests that are kept for reuse."),
    "prefix_bytes": ("prefix_bytes", "Bytes of copies and tokens by which prefixes are kept."),
    "pages": ("pages", "Pages of memory."),
    "free_pages": ("free_pages", "Pages of memory that nobody uses."),
}
_COUNTERS = {
    "steps": ("steps", "Steps of the engine."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("prompt_cached_tokens", "Tokens of prompts whose state was reused."),
    "new_tokens": ("generation_tokens", "Tokens that the model wrote."),
    "preemptions": ("preemptions", "Requests that gave way to others for a while."),
    "drafted_tokens": ("drafted_tokens", "Tokens that were drafted for the model to check."),
    "accepted_tokens": ("accepted_tokens", "Drafted tokens that the model would have chosen itself."),
}
_OFTEN = 0.1  # seconds between two looks at an engine's counters
_SPAN = 5.0  # seconds that a rate is taken over


class ModelMetrics:
    """The measurements of one model. Its engine's thread calls `stepped`; the others read."""

    def __init__(self, name: str, first: Histogram, following: Histogram) -> None:
        self.name = name
        self.first_token, self.next_token = first.labels(name), following.labels(name)
        self.figures = dict[str, int]()
        self._looked = 0.0
        self._recent = deque[tuple[float, int]]()  # time, new tokens of each recent step

    def stepped(self, engine: Engine, events: Sequence[Event]) -> None:
        """Takes what the engine counts after a step, or after a few of them: to sum it up takes a while."""
        now, new = time.monotonic(), sum(event.token is not None for event in events)
        if now - self._looked > _OFTEN or engine.idle:
            found, self._looked = engine.metrics, now
            self.figures = {name: int(getattr(found, name)) for name in (*_GAUGES, *_COUNTERS)}
        self._recent.append((now, new))
        while self._recent and self._recent[0][0] < now - _SPAN:
            self._recent.popleft()

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, over the last seconds."""
        now = time.monotonic()
        recent = [(when, new) for when, new in tuple(self._recent) if when > now - _SPAN]
        return sum(new for _, new in recent) / max(now - recent[0][0], 0.2) if recent else 0.0


class Metrics:
    """The measurements of a server."""

    def __init__(self) -> None:
        self._registry, self._models = CollectorRegistry(), list[ModelMetrics]()
        self._first = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._next = self._histogram("time_per_output_token_seconds", "Between two tokens of a request.")
        labels = ("endpoint", "status")
        self.requests = Counter("longwave_requests", "Requests answered.", labels, registry=self._registry)
        self.seconds = self._histogram("request_seconds", "Of answering a request.", "endpoint")
        self._registry.register(self)  # pyright: ignore[reportArgumentType]

    def of(self, name: str) -> ModelMetrics:
        """The measurements of a model that is added."""
        self._models.append(made := ModelMetrics(name, self._first, self._next))
        return made

    def text(self) -> bytes:
        """Everything in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the engines count, as Prometheus asks for it."""
        for field, (name, help) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(f"longwave_{name}", help, labels=["model"]), field)
        for field, (name, help) in _COUNTERS.items():
            yield self._filled(CounterMetricFamily(f"longwave_{name}", help, labels=["model"]), field)
        rates = GaugeMetricFamily("longwave_tokens_per_second", "New tokens a second, lately.", labels=["model"])
        for one in self._models:
            rates.add_metric([one.name], one.tokens_per_second)
        yield rates

    def _filled(self, family: Any, field: str) -> Metric:
        for one in self._models:
            family.add_metric([one.name], one.figures.get(field, 0))
        return family

    def _histogram(self, name: str, help: str, label: str = "model") -> Histogram:
        return Histogram(f"longwave_{name}", help, (label,), buckets=_SECONDS, registry=self._registry)
