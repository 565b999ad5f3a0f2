"""An engine's snapshot as Prometheus metrics, for whoever has one: the server, a gateway, a worker.

The suffixes are vLLM's, so its dashboards need only another prefix. Not here: what is counted elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pingjia.types import EngineStats

PREFIX = "pingjia_"

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


class EngineCollector(Collector):
    """Reads the engine's snapshot once per scrape, and whether a token could come out."""

    def __init__(self, stats: Callable[[], EngineStats], is_ready: Callable[[], bool]) -> None:
        self._stats = stats
        self._is_ready = is_ready

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(PREFIX + "ready", "1 while a token could come out", value=float(self._is_ready()))
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(PREFIX + name, text, value=value(stats))
        for name, text, value in _COUNTERS:
            yield CounterMetricFamily(PREFIX + name, text, value=value(stats))

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering does not need an engine that runs
