"""Clients of a pool: a steady rate, every second one streaming, or as many as fit; and what became of each request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Asked:
    """One request. replica: address:port of who answered it at last, empty when nobody did. error: empty when well."""

    began_s: float
    ended_s: float
    replica: str
    error: str
    tokens: int
    streamed: bool


class Clients:
    """Asks `url` from a thread of its own. All times are time.monotonic()."""

    def __init__(self, url: str, *, tokens: int = 40, key: str = "none") -> None:
        self._url, self._tokens = f"{url}/v1/chat/completions", tokens
        self._headers = {"authorization": f"Bearer {key}"}
        self.asked: list[Asked] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def steady(self, per_s: float) -> Clients:
        """Begin to ask so many times a second, however long answers take."""
        return self._start(self._steady, per_s)

    def crowd(self, num: int) -> Clients:
        """Begin to ask with `num` clients, each asking again when it has its answer."""
        return self._start(self._crowd, num)

    def stop(self) -> list[Asked]:
        """Ask nothing new, wait for what was asked."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join(150.0)
        assert not self._thread.is_alive(), "some requests never ended"
        return self.asked

    def between(self, start_s: float, end_s: float) -> list[Asked]:
        """Those that began then."""
        return [asked for asked in list(self.asked) if start_s <= asked.began_s < end_s]

    def _start(self, what: object, number: float) -> Clients:
        def run() -> None:
            asyncio.run(self._with_client(what, number))

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        return self

    async def _with_client(self, what: object, number: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(limits=limits, timeout=140.0, trust_env=False, headers=self._headers) as client:
            await what(client, number)  # type: ignore[operator]

    async def _steady(self, client: httpx.AsyncClient, per_s: float) -> None:
        tasks, due, number = set(), time.monotonic(), 0
        while not self._stop.is_set():
            task = asyncio.create_task(self._ask(client, number % 2 == 1))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number, due = number + 1, due + 1.0 / per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*tasks)

    async def _crowd(self, client: httpx.AsyncClient, num: float) -> None:
        async def one(streamed: bool) -> None:
            while not self._stop.is_set():
                await self._ask(client, streamed)

        await asyncio.gather(*(one(i % 2 == 1) for i in range(int(num))))

    async def _ask(self, client: httpx.AsyncClient, streamed: bool) -> None:
        body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": self._tokens, "stream": streamed}
        began, replica, error, tokens = time.monotonic(), "", "", 0
        try:
            async with client.stream("POST", self._url, json=body) as response:
                replica = response.headers.get("x-replica", "").rpartition(", ")[2]
                if streamed and response.status_code == 200:
                    tokens, error = await _read_stream(response)
                else:
                    data = await response.aread()
                    error = "" if response.status_code == 200 else f"{response.status_code} {data[:80]!r}"
                    tokens = self._tokens if not error else 0
        except httpx.HTTPError as e:
            error = type(e).__name__
        self.asked.append(Asked(began, time.monotonic(), replica, error, tokens, streamed))


async def _read_stream(response: httpx.Response) -> tuple[int, str]:
    """Tokens that came, and what was wrong with the end."""
    tokens, last = 0, ""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            last = line
            tokens += '"content":"' in line and '"content":""' not in line
            if '"error"' in line:
                return tokens, json.dumps(line)[:120]
    return tokens, "" if last == "data: [DONE]" else "cut off"


def shares(asked: Sequence[Asked]) -> dict[str, float]:
    """Part of the answered tokens by replica."""
    counts: Counter[str] = Counter()
    for one in asked:
        counts[one.replica] += one.tokens
    total = sum(counts.values()) or 1
    return {replica: num / total for replica, num in counts.items()}
