"""The gateway before a real server, that of llama-cpp-python, with SmolLM2: what a stub cannot vouch for.

It runs where llama-cpp-python with its server is installed, here or in the Python that PINGJIA_LLAMA_PYTHON names:
    python -m venv llama && llama/bin/pip install 'llama-cpp-python[server]==0.3.36'
    PINGJIA_LLAMA_PYTHON=llama/bin/python pytest tests/gateway/test_upstream_llama.py
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pingjia.errors import ModelError
from pingjia.gateway.upstream import Upstream
from pingjia.gateway.upstream_settings import UpstreamSettings
from pingjia.locate import locate_model


def _python() -> str:
    named = os.environ.get("PINGJIA_LLAMA_PYTHON", "")
    if named:
        return named
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        return sys.executable
    pytest.skip("NOT TESTED against a real server: set PINGJIA_LLAMA_PYTHON (see the head of this file)")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = _python()
    try:
        model = locate_model("smollm2")
    except ModelError as e:
        pytest.skip(f"NOT TESTED against a real server: {e}")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {"model": str(model), "model_alias": "smol", "port": port, "n_ctx": 512, "n_threads": 1,
               "interrupt_requests": "false", "host": "127.0.0.1", "verbose": "false"}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = Path(tmp_path_factory.mktemp("llama") / "log")
    with log.open("wb") as out:
        process = subprocess.Popen([python, "-m", "llama_cpp.server", *words], stdout=out, stderr=out)
    try:
        _wait(f"http://127.0.0.1:{port}/v1/models", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def gateway(llama: str, start_for_module: Callable[..., Any]) -> Any:
    # It answers one request at a time.
    settings = UpstreamSettings.model_validate({"servers": [{"url": llama, "max_concurrent": 1}]})
    return start_for_module(backend=Upstream(settings))


QUESTION: Any = [{"role": "user", "content": "Name the capital of France in one word."}]


def test_whole_streamed_and_kept(gateway: Any, llama: str) -> None:
    client = gateway.openai()
    fields: Any = {"model": "smol", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    direct = httpx.post(f"{llama}/chat/completions", json=fields, timeout=60).json()
    assert whole.choices[0].message.content == direct["choices"][0]["message"]["content"]
    assert whole.choices[0].finish_reason == direct["choices"][0]["finish_reason"]
    # It counts nothing in a stream: pieces stand for tokens then.
    assert abs(whole.usage.completion_tokens - direct["usage"]["completion_tokens"]) <= 1
    pieces = list(client.chat.completions.create(**{**fields, "temperature": 1e-6, "seed": 1}, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    again = gateway.http.post("/v1/chat/completions", json=fields)
    assert again.headers["x-cache"] == "HIT"


def test_completions_choices_and_the_demo(gateway: Any) -> None:
    body = {"model": "smol", "prompt": ["One, two,", "Red, green,"], "max_tokens": 4, "n": 2, "temperature": 0.8}
    answer = gateway.http.post("/v1/completions", json=body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert all(c["text"] for c in answer["choices"])
    demo = gateway.http.post("/", json={"prompt": "hi", "max_length": 60, "temperature": 0})
    assert demo.json()["status"] == 200, demo.text


def test_a_mistake_is_told_in_the_servers_words(gateway: Any) -> None:
    long = [{"role": "user", "content": "word " * 1000}]
    response = gateway.http.post("/v1/chat/completions", json={"model": "smol", "messages": long, "max_tokens": 4})
    assert response.status_code == 400
    assert "512" in response.json()["error"]["message"]


def test_leaving_stops_it(gateway: Any, eventually: Callable[..., None]) -> None:
    body = {"model": "smol", "messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 400,
            "stream": True, "temperature": 1}  # fmt: skip
    sock = gateway.raw("/v1/chat/completions", body)
    received = b""
    while b"data:" not in received:
        received += sock.recv(4096)
    sock.close()
    started = time.monotonic()
    answer = gateway.http.post(
        "/v1/chat/completions", json={"model": "smol", "messages": QUESTION, "max_tokens": 2, "temperature": 1}
    )
    assert answer.status_code == 200
    assert time.monotonic() - started < 15  # it does not finish what nobody reads: 400 tokens take it longer
