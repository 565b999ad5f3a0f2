"""Prometheus metrics of one app. The suffixes are vLLM's, so its dashboards need only another prefix.

The engine's own numbers are read from `Backend.stats()` when Prometheus asks; only what the gateway alone can see
(latencies, endings, HTTP errors) is counted here.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pingjia.engine_metrics import PREFIX, EngineCollector
from pingjia.gateway.answer import Tally
from pingjia.types import Backend

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_PER_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)


class Metrics:
    """One registry per app: two apps in a process do not share numbers."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(backend.stats, backend.is_ready))
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN_S)
        self._per_token = self._histogram("time_per_output_token_seconds", "Seconds per further token", _PER_TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end of the answer", _REQUEST_S)
        self._by_road = Histogram(
            PREFIX + "road_latency_seconds", "Arrival to the end of the answer, by road: direct, queue or none (kept)",
            ["road"], buckets=_REQUEST_S, registry=self.registry,
        )  # fmt: skip
        self._queued = self._histogram("request_queue_time_seconds", "Submission to a worker's claim", _REQUEST_S)
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

    def on_road(self, road: str, seconds: float) -> None:
        """Count how long a request took by the road it came."""
        self._by_road.labels(road).observe(seconds)

    def on_claim(self, model: str, wait_s: float) -> None:
        """Count how long a request waited that the worker of this process takes from the queue."""
        self._queued.labels(model).observe(wait_s)

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
