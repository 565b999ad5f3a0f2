"""Listening and stopping, in real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest
from gateway_fakes import ByteTokenizer, FakeBackend

from pingjia.errors import UserError
from pingjia.gateway import GatewaySettings, check_port, create_app, preflight, serve

ROOT = Path(__file__).resolve().parents[2]


def test_a_port_in_use_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = GatewaySettings(port=port)
        for attempt in (
            lambda: check_port("127.0.0.1", port),
            lambda: preflight(settings),
            lambda: serve(create_app(FakeBackend(), ByteTokenizer(), settings), settings),
        ):
            with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use; .*--port {port + 1}"):
                attempt()
    check_port("127.0.0.1", port)


def test_a_port_can_be_taken_again_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # leaves TIME_WAIT behind
        client.close()
    check_port("127.0.0.1", port)


def test_hosts_that_are_not_here():
    with pytest.raises(UserError, match="not an address of this machine"):
        check_port("203.0.113.9", 0)
    with pytest.raises(UserError, match="cannot be listened on"):
        check_port("no such host", 0)


def test_preflight_asks_for_keys_too(monkeypatch):
    monkeypatch.delenv("PINGJIA_API_KEYS", raising=False)
    with pytest.raises(UserError, match="API keys are required"):
        preflight(GatewaySettings(host="0.0.0.0", port=0))


SERVER = textwrap.dedent("""
    import sys
    sys.path.insert(0, {folder!r})
    from fakes import ByteTokenizer, FakeBackend, Script
    from pingjia.gateway import GatewaySettings, create_app, serve
    backend = FakeBackend(Script(text="x" * 20, token_s={token_s}))
    settings = GatewaySettings(port=0, drain_s={drain_s})
    serve(create_app(backend, ByteTokenizer(), settings), settings, on_ready=lambda url: print(url, flush=True))
    print("returned", len(backend.cancelled), flush=True)
""")


class Process:
    """A server in a process of its own."""

    def __init__(self, **values: float) -> None:
        code = SERVER.format(folder=str(Path(__file__).parent), **values)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self.results: list[httpx.Response] = []

    def ask(self, **fields) -> threading.Thread:
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}], **fields}
        thread = threading.Thread(
            target=lambda: self.results.append(httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=20))
        )
        thread.start()
        return thread

    def wait_for_running(self, num: int) -> None:
        end = time.monotonic() + 10
        while self.client.get("/health/live").json()["num_running"] < num:
            assert time.monotonic() < end
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        self.client.close()
        return self.process.returncode, out.strip(), err


@pytest.fixture
def process():
    made: list[Process] = []

    def make(**values: float) -> Process:
        made.append(Process(**values))
        return made[-1]

    yield make
    for p in made:
        if p.process.poll() is None:
            p.process.kill()
            p.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_serve_return(process, number):
    server = process(token_s=0.03, drain_s=10)
    threads = [server.ask(), server.ask(stream=True)]
    server.wait_for_running(2)
    server.process.send_signal(number)
    time.sleep(0.25)
    with pytest.raises(httpx.TransportError):  # nothing new is taken on
        httpx.get(f"{server.url}/health/live", timeout=2)
    for thread in threads:
        thread.join()
    code, out, err = server.end()
    assert (code, out) == (0, "returned 0")
    assert [r.status_code for r in server.results] == [200, 200]
    whole = next(r for r in server.results if r.headers["content-type"] == "application/json")
    assert whole.json()["choices"][0]["message"]["content"] == "x" * 20
    assert "[DONE]" in next(r.text for r in server.results if r is not whole)
    assert "Traceback" not in err


def test_answers_that_do_not_finish_in_time_end_with_an_error(process):
    server = process(token_s=5, drain_s=0.3)
    threads = [server.ask(), server.ask(stream=True)]
    server.wait_for_running(2)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code, out, err = server.end()
    assert (code, out) == (0, "returned 2")
    assert [r.status_code for r in server.results] == [503, 503]  # no token had come: the stream could still say so
    assert all(r.json()["error"]["code"] == "cancelled" for r in server.results)
    assert "Traceback" not in err


def test_a_stream_that_does_not_finish_in_time_ends_readably(process):
    server = process(token_s=0.2, drain_s=0.5)
    thread = server.ask(stream=True)
    server.wait_for_running(1)
    server.process.send_signal(signal.SIGTERM)
    thread.join()
    assert server.end()[:2] == (0, "returned 1")
    lines = [line for line in server.results[0].text.split("\n") if line]
    assert "x" in server.results[0].text
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "cancelled"
    assert lines[-1] == "data: [DONE]"


def test_the_access_log_goes_to_stderr_as_json(process):
    server = process(token_s=0, drain_s=1)
    assert server.client.get("/v1/models").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    _, _, err = server.end()
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/models", 200)]


def test_settings_are_light_and_nothing_here_needs_torch():
    code = (
        "import sys; import pingjia.gateway.settings; assert 'fastapi' not in sys.modules; "
        "import pingjia.gateway as g; [getattr(g, name) for name in g.__all__]; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
