"""Prometheus metrics of the servers behind the gateway."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pingjia.gateway.metrics import PREFIX
from pingjia.gateway.upstream import Upstream


class UpstreamCollector(Collector):
    """Reads once per scrape. A server is named by its URL, which holds no key."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily(f"{PREFIX}upstream_ready", "1 while the server gets requests", labels=["server"])
        running = GaugeMetricFamily(f"{PREFIX}upstream_running", "Answers it works on from here", labels=["server"])
        begun = CounterMetricFamily(f"{PREFIX}upstream_requests", "Requests that were sent to it", labels=["server"])
        failed = CounterMetricFamily(f"{PREFIX}upstream_failures", "Of these, those that it failed", labels=["server"])
        for server in self._upstream.servers:
            ready.add_metric([server.name], server.is_well)
            running.add_metric([server.name], server.num_outstanding)
            begun.add_metric([server.name], server.num_begun)
            failed.add_metric([server.name], server.num_failed)
        return ready, running, begun, failed

    def describe(self) -> Iterable[Metric]:
        return ()
