"""Prometheus metrics of one app. The suffixes are vLLM's, so its dashboards need only another prefix.

The engine's own numbers are read from `Backend.stats()` when Prometheus asks; only what the gateway alone can see
(latencies, endings, HTTP errors) is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pingjia.gateway.answer import Tally
from pingjia.types import EngineStats

PREFIX = "pingjia_"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_PER_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)

# name, help, what of the stats. Prometheus adds _total to counters.
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Sequences being computed", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences waiting for room", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "KV cache in use, 0 to 1", lambda s: s.kv_tokens_used / max(1, s.kv_tokens_total)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens taken in", lambda s: s.prompt_tokens_total),
    ("prompt_tokens_cached", "Of these, found in the cache and not computed again", lambda s: s.cached_tokens_total),
    ("generation_tokens", "Tokens generated", lambda s: s.generation_tokens_total),
    ("tokens_after_disconnect", "Tokens made for clients that had left", lambda s: s.tokens_after_disconnect_total),
    ("engine_steps", "Steps of the engine", lambda s: s.num_steps),
    ("engine_compute_seconds", "Seconds the engine spent in its steps", lambda s: s.compute_s_total),
)


class _EngineCollector(Collector):
    """Reads the engine's snapshot once per scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(PREFIX + name, text, value=value(stats))
        for name, text, value in _COUNTERS:
            yield CounterMetricFamily(PREFIX + name, text, value=value(stats))

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering does not need an engine that runs


class Metrics:
    """One registry per app: two apps in a process do not share numbers."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN_S)
        self._per_token = self._histogram("time_per_output_token_seconds", "Seconds per further token", _PER_TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end of the answer", _REQUEST_S)
        self._ended = Counter(
            PREFIX + "request_success",
            "Answers by how they ended: stop, length, abort, error",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._errors = Counter(PREFIX + "http_errors", "HTTP statuses from 400 up", ["status"], registry=self.registry)
        self._compute = Counter(PREFIX + "compute_seconds", "Machine time by key", ["key"], registry=self.registry)
        self._lost_facts = Counter(PREFIX + "ledger_errors", "Facts the ledger refused", registry=self.registry)

    def on_status(self, status: int) -> None:
        """Count an HTTP response. 499 is a client that left before its answer."""
        if status >= 400:
            self._errors.labels(str(status)).inc()

    def on_answer(self, model: str, tallies: Iterable[Tally], reason: str, started: float, ended: float) -> None:
        """Count the end of a request's choices; `reason` holds for those that have none of their own."""
        for tally in tallies:
            ended_by = tally.finish_reason or reason
            self._ended.labels(model, "abort" if ended_by == "cancelled" else ended_by).inc()
            if tally.first_at is not None:
                self._first.labels(model).observe(tally.first_at - started)
            if tally.first_at is not None and tally.last_at is not None and tally.num_tokens > 1:
                self._per_token.labels(model).observe((tally.last_at - tally.first_at) / (tally.num_tokens - 1))
        self._e2e.labels(model).observe(ended - started)

    def on_share(self, key_id: str, seconds: float) -> None:
        """Count a request's share of the machine."""
        self._compute.labels(key_id).inc(seconds)

    def on_lost_fact(self) -> None:
        self._lost_facts.inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
