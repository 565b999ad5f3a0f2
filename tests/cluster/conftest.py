"""Real servers where they are installed (tests/debian-packages.txt), and replicas without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pingjia.cluster.replica import Replica, State

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "chain"))

from servers import ConsulServer, Processes, Replicas, missing


def skip_without(*commands: str) -> None:
    lacking = missing(*commands)
    if lacking:
        pytest.skip(
            f"{', '.join(lacking)} not installed: sudo sh tests/install-debian-packages.sh tests/debian-packages.txt"
        )


@pytest.fixture
def need() -> Callable[..., None]:
    """need("nginx"): skip, loudly, when a server is not installed."""
    return skip_without


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def consul(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    """A Consul server for all tests of a file; each takes a pool of its own."""
    skip_without("consul")
    processes = Processes(tmp_path_factory.mktemp("consul"))
    try:
        server = ConsulServer(processes)
        server.start()
        yield server
    finally:
        processes.stop()


@pytest.fixture
def start(processes: Processes, consul: ConsulServer) -> Callable[..., Any]:
    """start(name, **settings) -> a stub replica in Consul's default pool unless told otherwise."""
    return Replicas(processes, consul.url, leave_s=0.5).start


@pytest.fixture
def replica() -> Callable[..., Replica]:
    """replica("a", weight=10, ...) at an address of its own."""

    def make(name: str, *, weight: int = 10, state: State = State.PASSING, digest: str = "d", **more: Any) -> Replica:
        port = more.pop("port", 8000 + sum(name.encode()))
        return Replica(name, more.pop("address", "10.0.0.1"), port, weight, state, model_digest=digest, **more)

    return make
