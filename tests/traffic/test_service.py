"""The whole service in one process: HTTP in front, a real engine behind, and clients that behave badly."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from pingjia import Engine, Message, Sampling
from pingjia.engine.draft import MOST
from pingjia.engine.settings import EngineSettings
from pingjia.gateway import create_app
from pingjia.gateway.server import _listen, _Server
from pingjia.gateway.settings import GatewaySettings
from pingjia.worker import Worker

QUESTIONS = [
    "你好",
    "What is the kettle price?",
    "客服电话是多少？",
    "a",
    "讲一个关于冰箱的故事吧",
    "1+1=",
    "再见",
    "Tell me more",
]


@dataclass
class Service:
    url: str
    engine: Engine
    http: httpx.Client

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return sum(float(v) for v in re.findall(rf"^(?:\w+:|\w+_)?{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE))

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def service(tiny_llama: Path) -> Iterator[Service]:
    engine = Engine(tiny_llama, settings=EngineSettings(max_num_seqs=8, kv_cache_tokens=4096))
    worker = Worker(engine)
    worker.start()
    settings = GatewaySettings(port=0, access_log=False)
    app = create_app(worker, engine.tokenizer, settings)
    sock = _listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    up = threading.Event()
    server = _Server(app, settings, url, lambda _: up.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert up.wait(20)
    yield Service(url, engine, httpx.Client(base_url=url, timeout=60))
    server.should_exit = True
    thread.join(20)
    worker.stop()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def test_eight_at_once_get_what_one_alone_gets(service: Service, tiny_llama: Path) -> None:
    sampling = Sampling(max_tokens=24)
    alone = Engine(tiny_llama, settings=EngineSettings(max_num_seqs=1, prefix_caching=False))
    expected = [alone.generate([[Message("user", q)]], sampling)[0].text for q in QUESTIONS]

    def ask(question: str) -> str:
        client = service.openai()
        stream = client.chat.completions.create(
            model=service.engine.models()[0].id,
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
        return "".join(event.choices[0].delta.content or "" for event in stream if event.choices)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, QUESTIONS)) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation_within_one_step(service: Service, stream: bool) -> None:
    before = service.metric("tokens_after_disconnect_total")
    made_before = service.metric("generation_tokens_total")
    body = json.dumps(
        {
            "model": service.engine.models()[0].id,
            "messages": [{"role": "user", "content": "你好"}],
            "max_tokens": 400,
            "stream": stream,
            "stop_token_ids": [],
            "ignore_eos": True,
        }
    ).encode()
    address = service.url.removeprefix("http://").split(":")
    sock = socket.create_connection((address[0], int(address[1])))
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    sock.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n".encode() + body)
    wait_for(lambda: service.engine.stats().generation_tokens_total > made_before + 3, "tokens come")
    sock.close()
    wait_for(lambda: service.engine.stats().num_running == 0, "the request ends")
    made = service.metric("generation_tokens_total") - made_before
    assert made < 400, "it went on to the end"
    # One step: a token and as many as were guessed right.
    assert service.metric("tokens_after_disconnect_total") - before <= 1 + MOST
    settled = service.engine.stats().generation_tokens_total
    time.sleep(0.1)
    assert service.engine.stats().generation_tokens_total == settled


def test_a_prompt_over_the_limit_names_both_numbers(service: Service) -> None:
    limit = service.engine.max_model_len
    body = {
        "model": service.engine.models()[0].id,
        "messages": [{"role": "user", "content": "长" * 2000}],
        "max_tokens": 8,
    }
    response = service.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in error["message"]
    assert len(re.findall(r"\d+", error["message"])) >= 2


def test_a_wrong_type_is_refused_by_name(service: Service) -> None:
    body = {
        "model": service.engine.models()[0].id,
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": "hot",
    }
    response = service.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_random_traffic_answers_every_request_exactly_once(service: Service) -> None:
    """Unary, streamed, cancelled and refused requests mixed; afterwards the engine is empty and still answers."""
    model = service.engine.models()[0].id

    def one(number: int) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTIONS[number % 8]}],
            "max_tokens": 5 + number % 17,
            "temperature": (number % 3) / 2,
            "seed": number,
        }
        kind = number % 4
        if kind == 0:
            return service.http.post("/v1/chat/completions", json=body).json()["choices"][0]["finish_reason"]
        if kind == 1:
            with service.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                lines = [line for line in response.iter_lines() if line.startswith("data: ")]
            assert lines[-1] == "data: [DONE]"
            reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
            assert sum(reason is not None for reason in reasons) == 1
            return next(reason for reason in reasons if reason)
        if kind == 2:
            with service.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                next(response.iter_lines())
            return "left"
        return service.http.post("/v1/chat/completions", json={**body, "max_tokens": 10_000}).json()["error"]["code"]

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(one, range(80)))
    assert {r for i, r in enumerate(results) if i % 4 < 2} <= {"stop", "length"}
    assert {results[i] for i in range(3, 80, 4)} == {"context_length_exceeded"}
    wait_for(
        lambda: service.engine.stats().num_running + service.engine.stats().num_waiting == 0, "the engine is empty"
    )
    assert service.engine.stats().kv_tokens_used == 0
    assert one(0) in ("stop", "length")
