"""`pingjia serve --consul` and `pingjia worker --consul` with a real engine (a tiny network) in real processes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import ConsulServer, Processes, free_ports, until

from pingjia.cluster import Consul, ConsulSettings, read_replicas
from pingjia.cluster.replica import State
from pingjia.cluster.rollout import Pool, StepFailed


@pytest.fixture
def pool(consul: ConsulServer) -> Iterator[Callable[[str], list[Any]]]:
    """pool("name") -> its replicas as Consul shows them."""
    client = Consul(ConsulSettings(url=consul.url))
    yield lambda service: read_replicas(client.health(service).body)
    client.close()


def test_serve_joins_measures_itself_and_leaves(
    tiny_llama: Path, processes: Processes, consul: ConsulServer, pool: Any
) -> None:
    (port,) = free_ports(1)
    line = [sys.executable, "-m", "pingjia.cli.main", "serve", str(tiny_llama), "--port", str(port),
            "--consul", consul.url, "--name", "tiny", "--service", "serving"]  # fmt: skip
    process = processes.start("serve", line)
    until(lambda: pool("serving") or process.poll() is not None, "a replica in the pool", 120.0)
    assert process.poll() is None, processes.log("serve").read_text()[-2000:]
    (replica,) = pool("serving")
    assert replica.state is State.PASSING
    assert (replica.name, replica.url) == ("tiny", f"http://127.0.0.1:{port}")
    assert replica.tokens_per_s > 1
    assert len(replica.model_digest) == 64
    assert replica.seats > 0
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx.post(f"{replica.url}/v1/chat/completions", json=body, trust_env=False, timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    until(lambda: not pool("serving"), "its leaving", 10.0)
    assert process.wait(60) == 0
    assert "HTTP Request" not in processes.log("serve").read_text()


def test_a_worker_is_seen_and_says_why_it_is_not_drained(
    tiny_llama: Path, processes: Processes, consul: ConsulServer, pool: Any, need: Any
) -> None:
    need("redis-server")
    redis_port, health_port = free_ports(2)
    processes.start(
        "redis", ["redis-server", "--port", str(redis_port), "--save", "", "--dir", str(processes.directory)]
    )
    url = f"redis://127.0.0.1:{redis_port}/0"

    def answers() -> bool:
        import redis

        try:
            return bool(redis.Redis.from_url(url).ping())
        except redis.ConnectionError:
            return False

    until(answers, "Redis")
    line = [sys.executable, "-m", "pingjia.cli.main", "worker", str(tiny_llama), "--redis-url", url,
            "--health-port", str(health_port), "--consul", consul.url, "--name", "w1"]  # fmt: skip
    process = processes.start("worker", line)

    def passing() -> list[Any]:
        return [r for r in pool("pingjia-workers") if r.state is State.PASSING]

    until(lambda: passing() or process.poll() is not None, "a worker in the pool", 120.0)
    assert process.poll() is None, processes.log("worker").read_text()[-2000:]
    (worker,) = passing()
    assert (worker.name, worker.port) == ("w1", health_port)
    operator = Pool(Consul(ConsulSettings(url=consul.url)), "pingjia-workers", timeout_s=10.0)
    with pytest.raises(StepFailed, match="takes its requests from a queue: end it with SIGTERM"):
        operator.drain(worker, settle_s=0.0)
    assert passing()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not pool("pingjia-workers")
