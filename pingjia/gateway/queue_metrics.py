"""Prometheus metrics of the two roads and of the queue, from the gateway's last look at it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pingjia.engine_metrics import PREFIX
from pingjia.gateway.roads import Roads


class QueueCollector(Collector):
    """Reads once per scrape. Several gateways on one queue tell the same of it; the roads are each one's own."""

    def __init__(self, roads: Roads) -> None:
        self._roads = roads

    def collect(self) -> Iterable[Metric]:
        stats = self._roads.queued.snapshot
        gauges = {
            "requests_waiting": ("Requests that wait in the queue", stats.num_waiting),
            "tokens_waiting": ("Their tokens: prompts and longest answers", stats.units_waiting),
            "requests_claimed": ("Requests that workers took from the queue and work on", stats.num_claimed),
            "tenants_waiting": ("Keys with something waiting", stats.num_tenants),
            "workers": ("Workers that are heard of and ready", sum(worker.is_ready for worker in stats.workers)),
            "worker_seats": ("Answers they compute at once", sum(w.seats for w in stats.workers if w.is_ready)),
            "oldest_seconds": ("Age of the request that waits longest", stats.oldest_s),
            "reachable": ("1 while the queue can be reached", 0 if self._roads.queued.is_lost else 1),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}queue_{name}", text, value=value)
        text = "Requests taken over from workers that died"
        yield CounterMetricFamily(f"{PREFIX}queue_redelivered", text, value=stats.num_redelivered)
        yield _labelled("queue_ended", "Requests that left the queue, by how they ended", "how", dict(stats.ended))
        yield _labelled("road_requests", "Requests by the road they took", "road", dict(self._roads.num_taken))

    def describe(self) -> Iterable[Metric]:
        return ()


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for value, num in sorted(values.items()):
        family.add_metric([value], num)
    return family
