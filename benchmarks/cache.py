"""The result cache under repeated questions: hit rate, seconds saved, how fast a kept answer is, and wrong hits.

Usage: python benchmarks/cache.py [--out FILE] [--requests 2000] [--questions 500] [--redis redis://127.0.0.1:6379/0]
A gateway on loopback over a scripted backend: 50 ms to the first token, 2 ms for each further one, and an answer that
repeats what was asked, so that an answer to another question is seen. Questions are drawn by Zipf's law (the k-th most
frequent has a share in proportion to 1/k), from 8 clients at once, every second one streaming. `best` is the hit rate
of a cache that never forgets. Then pairs of questions that are nearly equal are asked after each other, by two keys
and of two models: every hit among them is a wrong one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from pingjia import gateway
from pingjia.chat import load_tokenizer
from pingjia.gateway.keys import KeyFile
from pingjia.types import Chunk, EngineStats, ModelCard, Request, Usage

ROOT = Path(__file__).resolve().parents[1]
FIRST_S, TOKEN_S = 0.05, 0.002
NUM_CLIENTS = 8
CARDS = [ModelCard("base", "base", None, 8192, 1, "b" * 64), ModelCard("shop", "shop", "base", 8192, 2, "s" * 64)]

NEARLY_EQUAL = (
    ("Is 3 larger than 5?", "Is 5 larger than 3?"),
    ("退货要7天吗", "退货要17天吗"),
    ("可以退货吗", "不可以退货吗"),
    ("How do I turn it on?", "How do I turn it on? "),
    ("A在B的左边吗", "B在A的左边吗"),
    ("price in yuan", "price in Yuan"),
    ("1.0", "1.00"),
    ("a\nb", "a\\nb"),
    ("é", "e\u0301"),
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {}, {"seed": 1}, {"seed": 2}, {"temperature": 0.5, "seed": 1}, {"top_p": 0.9}, {"top_k": 5}, {"stop": ["~"]},
    {"presence_penalty": 0.1}, {"max_tokens": 199}, {"logit_bias": {"5": 1}},
)  # fmt: skip


class Scripted:
    """A backend that says what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_computed = 0

    def models(self) -> list[ModelCard]:
        return CARDS

    def is_ready(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        return EngineStats()

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        self.num_computed += 1
        s = request.sampling
        said = f"{request.adapter} {s.temperature} {s.seed} {self.tokenizer.decode(request.prompt_ids)}"
        ids = self.tokenizer.encode(said)[: s.max_tokens]
        await asyncio.sleep(FIRST_S)
        decoder = self.tokenizer.stream()
        for token in ids:
            yield Chunk(decoder.feed([token]), (token,))
            await asyncio.sleep(TOKEN_S)
        yield Chunk(decoder.flush(), finish_reason="stop", usage=Usage(len(request.prompt_ids), len(ids)))


class Server:
    """The gateway in a thread of this process, and two keys for it."""

    def __init__(self, folder: Path, redis_url: str | None) -> None:
        file = KeyFile(folder / "keys.json")
        self.keys = [file.create(name).secret for name in ("one", "two")]
        settings = gateway.GatewaySettings(
            port=0, access_log=False, keys_file=str(file.path), redis_url=redis_url, queue_above_rps=1e9
        )
        tokenizer = load_tokenizer("smollm2")
        self.backend = Scripted(tokenizer)
        app = gateway.create_app(self.backend, tokenizer, settings)
        ready, self.url = threading.Event(), ""

        def up(url: str) -> None:
            self.url = url
            ready.set()

        threading.Thread(target=gateway.serve, args=(app, settings), kwargs={"on_ready": up}, daemon=True).start()
        assert ready.wait(30)

    def client(self, key: int = 0) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


def ask(client: httpx.Client, question: str, **fields: Any) -> tuple[str, str, float]:
    """(X-Cache, the answer's text, seconds to its end)."""
    body = {"model": "base", "messages": [{"role": "user", "content": question}], "max_tokens": 200, **fields}
    started = time.perf_counter()
    response = client.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return response.headers["x-cache"], "".join(_texts(response)), seconds


def _texts(response: httpx.Response) -> Iterator[str]:
    if response.headers["content-type"].startswith("application/json"):
        yield response.json()["choices"][0]["message"]["content"]
        return
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            yield from (c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])


def mixed_load(server: Server, num_requests: int, num_questions: int) -> dict[str, Any]:
    """Repeated questions by Zipf's law, from several clients at once."""
    rng = random.Random(7)
    weights = [1 / (k + 1) for k in range(num_questions)]
    drawn = rng.choices(range(num_questions), weights, k=num_requests)
    clients = threading.local()

    def one(job: tuple[int, int]) -> tuple[str, bool, float]:
        i, k = job
        if not hasattr(clients, "client"):
            clients.client = server.client()
        question = f"Question number {k}: what about article {k * 37 % 1009}?"
        outcome, text, seconds = ask(clients.client, question, stream=i % 2 == 1)
        return outcome, question in text, seconds

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        results = list(pool.map(one, enumerate(drawn)))
    assert all(right for _, right, _ in results), "an answer to another question"
    hits = [seconds for outcome, _, seconds in results if outcome == "HIT"]
    misses = [seconds for outcome, _, seconds in results if outcome == "MISS"]
    return {
        "requests": num_requests,
        "distinct": len(set(drawn)),
        "computed": server.backend.num_computed,
        "hit_rate": round(len(hits) / num_requests, 4),
        "best": round(1 - len(set(drawn)) / num_requests, 4),
        "seconds": round(time.perf_counter() - started, 2),
        "hit_median_ms_in_load": round(statistics.median(hits) * 1000, 2),
        "miss_median_ms": round(statistics.median(misses) * 1000, 2),
    }


def alone(server: Server, num: int = 300) -> dict[str, float]:
    """A kept answer over HTTP, asked by one client at a time."""
    client = server.client()
    ask(client, "The question that is asked again.")
    seconds = {"whole": [], "stream": []}  # type: dict[str, list[float]]
    for i in range(num):
        kind = "stream" if i % 2 else "whole"
        outcome, _, took = ask(client, "The question that is asked again.", stream=kind == "stream")
        assert outcome == "HIT"
        seconds[kind].append(took)
    return {f"hit_median_ms_{kind}": round(statistics.median(s) * 1000, 2) for kind, s in seconds.items()}


def nearly_equal(server: Server) -> dict[str, int]:
    """Questions that differ a little, in text, key, model or sampling: each must be computed for itself."""
    texts = [text for pair in NEARLY_EQUAL for text in pair]
    clients = [server.client(key) for key in (0, 1)]

    def is_wrong(asked: tuple[int, str, dict[str, Any], str]) -> bool:
        key, model, fields, text = asked
        outcome, answer, _ = ask(clients[key], text, model=model, **fields)
        says = f"{'shop' if model == 'shop' else None} {float(fields.get('temperature', 0))} {fields.get('seed')}"
        return outcome == "HIT" or not answer.startswith(says) or text not in answer

    pairs = list(itertools.product((0, 1), ("base", "shop"), SAMPLINGS, texts))
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return {"adversarial": len(pairs), "wrong": sum(pool.map(is_wrong, pairs))}


def saved_seconds(server: Server) -> float:
    lines = server.client().get("/metrics").text.splitlines()
    return round(float(next(x for x in lines if x.startswith("pingjia_cache_saved_seconds_total")).split()[1]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--redis")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), options.redis)
        result = mixed_load(server, options.requests, options.questions)
        result["saved_s"] = saved_seconds(server)
        result |= alone(server)
        result |= nearly_equal(server)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result |= {"store": "redis" if options.redis else "memory", "machine": machine, "commit": commit.stdout.strip()}
    text = json.dumps({**result, "date": date.today().isoformat()})
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
