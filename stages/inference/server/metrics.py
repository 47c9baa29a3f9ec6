"""What Prometheus may scrape: the schedulers' own counts, and what only the server sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stages.inference.scheduler import Load, Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
    "running": "Answers being written.",
    "waiting": "Answers waiting for a slot.",
    "untaken": "Answers written, but not yet taken by those who asked.",
    "tokens_per_second": "Tokens a second over the last steps of work.",
    "prompt_bytes": "Bytes of encoded prompts that are kept.",
}
_COUNTERS = {
    "generated_tokens": "Tokens written.",
    "prompt_tokens": "Tokens of prompts.",
    "prompt_hits": "Prompts found encoded.",
    "prompt_misses": "Prompts that were encoded.",
}


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Schedulers(schedulers))
        ProcessCollector(registry=self._registry)
        self._responses = Counter(
            "minicodformer_responses", "Responses begun.", ("path", "status"), registry=self._registry
        )
        self._first = Histogram(
            "minicodformer_first_token_seconds",
            "From the arrival of a request to the first token of each of its answers.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """`path` is a route's, never what a caller wrote, who could make these counts as many as he likes."""
        self._responses.labels(path, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Schedulers(Collector):
    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._schedulers = schedulers

    def collect(self) -> Iterable[Metric]:
        loads: dict[str, Load] = {name: scheduler.load() for name, scheduler in self._schedulers.items()}
        for kind, described in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, meaning in described.items():
                family = kind(f"minicodformer_{field}", meaning, labels=["model"])
                for name, load in loads.items():
                    family.add_metric([name], getattr(load, field))
                yield family
