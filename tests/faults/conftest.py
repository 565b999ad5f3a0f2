"""Real processes: redis-server, gateways and workers, to be killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

_spec = importlib.util.spec_from_file_location("queue_conftest", HERE.parent / "queue" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_queue = importlib.util.module_from_spec(_spec)
sys.modules["queue_conftest"] = _queue
_spec.loader.exec_module(_queue)
RedisServer = _queue.RedisServer
_redis = _queue._redis
redis_server = _queue.redis_server


class Processes:
    """Starts workers and gateways; everything that is still there ends with the test."""

    def __init__(self, redis: RedisServer, directory: Path) -> None:
        self.redis = redis
        self.prefix = "pingjia:"
        self.log = directory / "tokens.log"
        self.log.touch()
        self.errors = directory / "stderr.log"
        self.all: list[subprocess.Popen[str]] = []

    def worker(self, *, seats: int = 16, token_s: float = 0.002, lease_s: float = 1.0) -> subprocess.Popen[str]:
        options = [self.redis.url, self.prefix, seats, token_s, lease_s, self.log]
        return self._start("scripted_worker.py", *options)

    def gateway(self, *options: object, lease_s: float = 1.0, port: int = 0) -> tuple[subprocess.Popen[str], str]:
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        return self._start("scripted_gateway.py", self.redis.url, port, lease_s, *options), f"http://127.0.0.1:{port}"

    def tokens(self) -> list[str]:
        """Ids of the requests, one per token that any worker made."""
        return [line.split()[1] for line in self.log.read_text().splitlines() if len(line.split()) == 2]

    def _start(self, script: str, *options: object) -> subprocess.Popen[str]:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        environ.pop("PINGJIA_API_KEYS", None)
        environ["XDG_STATE_HOME"] = str(self.log.parent)
        with open(self.errors, "a") as errors:
            process = subprocess.Popen(
                [sys.executable, str(HERE / script), *map(str, options)],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environ, cwd=ROOT,
            )  # fmt: skip
        self.all.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), self.errors.read_text()[-3000:]
        return process

    def stop(self) -> None:
        for process in self.all:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(20)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def processes(redis_server: RedisServer, tmp_path: Path) -> Iterator[Processes]:
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    processes = Processes(redis_server, tmp_path)
    yield processes
    processes.stop()


@pytest.fixture
def eventually() -> Callable[..., None]:
    def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never happened: {what}"
            time.sleep(0.02)

    return wait_until


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex[:8]
