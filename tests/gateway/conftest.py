"""A real uvicorn on a free loopback port over the fake backend, and clients for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pingjia.gateway import create_app
from pingjia.gateway.server import _listen, _Server
from pingjia.gateway.settings import GatewaySettings
from pingjia.ledger import Ledger

# Test folders are no packages; the name is long so that another room's fakes.py does not meet it.
_spec = importlib.util.spec_from_file_location("gateway_fakes", Path(__file__).with_name("fakes.py"))
assert _spec is not None
assert _spec.loader is not None
fakes = importlib.util.module_from_spec(_spec)
sys.modules["gateway_fakes"] = fakes
_spec.loader.exec_module(fakes)


class Gateway:
    """A server in a thread."""

    def __init__(
        self, settings: GatewaySettings, ledger: Ledger | None = None, backend: Any = None, **options: Any
    ) -> None:
        self.backend = backend or fakes.FakeBackend()
        self.tokenizer = fakes.ByteTokenizer()
        self.ledger = ledger
        self.app = create_app(self.backend, self.tokenizer, settings, ledger=ledger, **options)
        sock = _listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        up = threading.Event()
        self.server = _Server(self.app, settings, self.url, lambda _: up.set())
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()
        assert up.wait(10)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def chat(self, content: Any = "hi", **fields: Any) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    @staticmethod
    def head(path: str, num_bytes: int) -> bytes:
        """A request head that announces a JSON body."""
        lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {num_bytes}")
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode()

    def raw(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connected socket that has sent the whole request."""
        data = json.dumps(body).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.sendall(self.head(path, len(data)) + data)
        return sock

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)


@contextmanager
def running(settings: GatewaySettings, ledger: Ledger | None = None, backend: Any = None) -> Iterator[Gateway]:
    gateway = Gateway(settings, ledger, backend)
    try:
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    ledger = Ledger(tmp_path_factory.mktemp("gateway") / "ledger.jsonl")
    with running(GatewaySettings(port=0, ping_s=0.2, access_log=False), ledger) as gateway:
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    """The shared server with default limits, its backend fresh."""
    _shared.backend.reset()
    _shared.tokenizer.render_s = 0.0
    yield _shared
    wait_until(lambda: _shared.backend.running == 0, "the backend is idle after the test")


@contextmanager
def _starter() -> Iterator[Callable[..., Gateway]]:
    started: list[Gateway] = []

    def start(
        ledger: Ledger | None = None, backend: Any = None, spent: Any = None, adapters: Any = None, **settings: Any
    ) -> Gateway:
        own = GatewaySettings(port=0, access_log=False, **settings)
        started.append(Gateway(own, ledger, backend, spent=spent, adapters=adapters))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Gateway]]:
    """Start servers with other settings; they stop with the test."""
    with _starter() as starter:
        yield starter


@pytest.fixture(scope="module")
def start_for_module() -> Iterator[Callable[..., Gateway]]:
    """The same, but they stop with the module."""
    with _starter() as starter:
        yield starter


@pytest.fixture
def eventually() -> Callable[..., None]:
    return wait_until


class Redis:
    """A redis-server on a free port, without files, that can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(["redis-server", *self.options], stdout=subprocess.DEVNULL)
        wait_until(self._answers, "redis-server answers", 10)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                sock.sendall(b"PING\r\n")
                return sock.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A redis-server for one test."""
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: there is no redis-server here; see tests/debian-packages.txt")
    server = Redis(tmp_path)
    server.start()
    yield server
    server.stop()
