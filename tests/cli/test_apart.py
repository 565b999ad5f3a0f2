"""`pingjia gateway` and `pingjia worker`: what is wrong is said before anything is loaded, and both work together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(*words: str, url: str = "") -> list[str]:
    return [sys.executable, "-m", "pingjia.cli.main", *words, *(["--redis-url", url] if url else [])]


def environ() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PINGJIA_")}


@pytest.mark.parametrize("verb", ["gateway", "worker"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no queue: give --redis-url"),
        ("http://x", "redis_url"),
        ("redis://127.0.0.1:1/0", "no Redis server answers"),
    ],
)
def test_no_queue_is_the_users_fault(verb: str, url: str, says: str) -> None:
    pytest.importorskip("redis")
    words = [verb, "nothing", *(["--port", "0"] if verb == "gateway" else [])]
    done = subprocess.run(command(*words, url=url), capture_output=True, text=True, env=environ(), timeout=60)
    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.split())


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def wait_ready(url: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            ask(f"{url}/health/ready")
            return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end, "never ready"
            time.sleep(0.2)


def test_a_gateway_and_a_worker_answer_as_serve_does(tiny_llama: Path, tmp_path: Path) -> None:
    """Both verbs over a real Redis and a real engine, and a stop by SIGTERM with exit code 0."""
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: there is no redis-server here; see tests/debian-packages.txt")
    redis_port, port = free_port(), free_port()
    redis_url, url = f"redis://127.0.0.1:{redis_port}/0", f"http://127.0.0.1:{port}"
    options = ["--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with open(tmp_path / "log", "w") as log:
        redis = subprocess.Popen(["redis-server", *options], stdout=log)
        time.sleep(0.5)
        parts = [
            subprocess.Popen(command(*words, url=redis_url), env=environ(), stdout=log, stderr=log)
            for words in (["worker", str(tiny_llama)], ["gateway", str(tiny_llama), "--port", str(port)])
        ]
        try:
            wait_ready(url)
            model = ask(f"{url}/v1/models")["data"][0]["id"]
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            answer = ask(f"{url}/v1/chat/completions", body)
            assert answer["usage"]["completion_tokens"] <= 5
            assert answer["choices"][0]["finish_reason"] in ("stop", "length")
            for part in parts:
                part.send_signal(signal.SIGTERM)
            assert [part.wait(30) for part in parts] == [0, 0], (tmp_path / "log").read_text()[-2000:]
        finally:
            for process in (*parts, redis):
                process.kill()
                process.wait(20)
