"""A real redis-server of its own for the tests of the queue, and makers of jobs."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pingjia.queue.job import Job
from pingjia.queue.memory import MemoryQueue
from pingjia.queue.policy import Limits
from pingjia.types import Request, Sampling


class RedisServer:
    """redis-server with an append-only file, on a free port; can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "everysec", "--loglevel", "warning"]
        self.process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as s:
                    s.sendall(b"PING\r\n")
                    if s.recv(16).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            assert time.monotonic() < end, "redis-server did not start"
            time.sleep(0.02)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(20)
        self.process = None


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: there is no redis-server here; see tests/debian-packages.txt")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture
def redis_server(_redis: RedisServer) -> RedisServer:
    """The server, running."""
    if _redis.process is None:
        _redis.start()
    return _redis


class Clock:
    """Seconds that a test moves. Redis has its own clock: there it really waits."""

    def __init__(self, is_real: bool) -> None:
        self.is_real = is_real
        self.now = 1000.0

    def __call__(self) -> float:
        return time.monotonic() if self.is_real else self.now

    async def pass_s(self, seconds: float) -> None:
        import asyncio

        self.now += seconds
        await asyncio.sleep(seconds if self.is_real else 0)


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "redis":
        request.getfixturevalue("redis_server")
    return request.param


@pytest.fixture
def clock(kind: str) -> Clock:
    return Clock(is_real=kind == "redis")


@pytest.fixture
async def make(kind: str, clock: Clock, request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """make(**limits) -> an empty queue of the kind under test."""
    opened: list[Any] = []

    def open_one(**limits: Any) -> Any:
        if kind == "memory":
            opened.append(MemoryQueue(Limits(**limits), clock))
        else:
            from pingjia.queue.streams import StreamQueue

            url = request.getfixturevalue("redis_server").url
            opened.append(StreamQueue(url, Limits(**limits), prefix=f"t{uuid.uuid4().hex}:"))
        return opened[-1]

    yield open_one
    for queue in opened:
        await queue.close()


def make_job(name: str, *, prompt: int = 3, tokens: int = 7, adapter: str | None = None, **fields: Any) -> Job:
    request = Request(name, tuple(range(prompt)), Sampling(max_tokens=tokens), adapter)
    return Job(request, **fields)


@pytest.fixture
def job() -> Callable[..., Job]:
    return make_job
