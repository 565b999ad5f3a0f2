"""The worker's own port: alive from the first moment, ready while tokens come out, numbers for Prometheus."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from pingjia.errors import UserError
from pingjia.queue.job import Claim, End, Job
from pingjia.types import EngineStats, ModelCard, Request, Sampling
from pingjia.worker import health as room
from pingjia.worker.health import Health, served


class Fake:
    ready = True

    def models(self):
        return [ModelCard("base", "/m")]

    def stats(self):
        return EngineStats(num_running=3, generation_tokens_total=7)

    def is_ready(self):
        return self.ready


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def http(health):
    with served(health, "127.0.0.1", 0) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


def statuses(http):
    return [http.get(f"/health/{what}").status_code for what in ("live", "ready")]


def test_from_loading_to_the_end(health, http):
    assert statuses(http) == [200, 503], "it loads"
    health.loaded(backend := Fake())
    assert statuses(http) == [200, 503], "it does not pull yet"
    health.turned(is_pulling=True)
    assert statuses(http) == [200, 200]
    backend.ready = False
    assert statuses(http) == [200, 503], "the engine is stuck"
    backend.ready = True
    health.turned(is_pulling=False)
    assert statuses(http) == [200, 503], "it drains, or the queue is away"
    assert http.get("/health").json()["num_running"] == 3


def test_a_stuck_event_loop_is_not_alive(health, http, monkeypatch):
    health.loaded(Fake())
    health.turned(is_pulling=True)
    monkeypatch.setattr(room, "STUCK_S", 0.05)
    time.sleep(0.1)
    assert statuses(http) == [503, 503]
    health.turned(is_pulling=True)
    assert statuses(http) == [200, 200]


def test_numbers(health, http):
    health.loaded(Fake())
    job = Job(Request("r", (1,), Sampling(), "shop"), deadline_s=10.0)
    health.on_claim(Claim(job, 1, left_s=6.5))
    health.on_end(End("done"))
    text = http.get("/metrics").text
    assert 'pingjia_request_queue_time_seconds_sum{model_name="shop"} 3.5' in text
    assert 'pingjia_worker_requests_total{how="done"} 1.0' in text
    assert "pingjia_generation_tokens_total 7.0" in text
    assert "pingjia_tokens_after_disconnect_total 0.0" in text
    assert "pingjia_ready 0.0" in text


def test_a_port_that_is_taken_is_the_users_fault(health):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"health port {port} on 127.0.0.1: .*--health-port"),
            served(health, "127.0.0.1", port),
        ):
            pass


def test_the_port_is_free_again_afterwards(health):
    with served(health, "127.0.0.1", 0) as url:
        port = int(url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        pass
