"""A replica without a model: an engine of a fixed rate behind the real HTTP API, in a real pool.

Usage: python benchmarks/chain/stub.py '{"port": 8001, "tokens_per_s": 200, "consul": "http://127.0.0.1:8500", ...}'
SIGUSR1 halves its rate, SIGUSR2 restores it. Everything but the engine is what `pingjia serve --consul` runs.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from stub_settings import StubSettings

from pingjia.chat.tokenizer import as_messages
from pingjia.cluster import ConsulSettings, Member, MemberSettings, calibrate
from pingjia.cluster.member import About
from pingjia.cluster.speed import Speed
from pingjia.errors import ModelError
from pingjia.gateway import GatewaySettings, create_app, hash_key, serve
from pingjia.types import Chunk, EngineStats, Message, ModelCard, Request, Usage

FIRST_BYTE = 3


class ByteTokenizer:
    """Token id = byte + 3."""

    family = "hf"
    vocab_size = 256 + FIRST_BYTE
    pad_id = 0
    stop_ids = frozenset({2})
    template_digest = "0" * 64

    def encode(self, text: str) -> list[int]:
        return [b + FIRST_BYTE for b in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        return [1, *self.encode("".join(f"{m.role}: {m.content}\n" for m in as_messages(messages)))]

    def render_text(self, text: str) -> list[int]:
        return [1, *self.encode(text)]


class FixedRate:
    """Makes `tokens_per_s` tokens a second in all, shared by the answers in its seats; the others wait their turn.

    A step gives every seated answer a token and takes as long as so many tokens take. Steps keep to a schedule, so that
    a busy machine delays single tokens and not the rate.
    """

    def __init__(self, settings: StubSettings) -> None:
        self.rate, self.seats, self.fails = settings.tokens_per_s, settings.seats, settings.fails
        self.slow = 1.0
        self._digest = settings.digest
        self._adapters: dict[str, ModelCard] = {}
        self._seated: list[asyncio.Queue[int]] = []
        self._num_waiting = 0
        self._room: asyncio.Condition | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._num_tokens = self._num_steps = 0
        self._compute_s = 0.0

    def models(self) -> list[ModelCard]:
        return [ModelCard("stub", "stub", None, 8192, 1, self._digest), *self._adapters.values()]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._seated),
            num_waiting=self._num_waiting,
            generation_tokens_total=self._num_tokens,
            num_steps=self._num_steps,
            compute_s_total=self._compute_s,
        )

    def is_ready(self) -> bool:
        return not self.fails

    def load_adapter(self, name: str, path: str) -> Future[None]:
        """The digest is the content of the file."""
        future: Future[None] = Future()
        try:
            digest = (Path(path) / "digest").read_text().strip()
        except OSError as e:
            future.set_exception(ModelError(f"{path}: {e.strerror}"))
            return future
        self._adapters[name] = ModelCard(name, path, "stub", 8192, 1, digest)
        future.set_result(None)
        return future

    def unload_adapter(self, name: str) -> Future[None]:
        future: Future[None] = Future()
        del self._adapters[name]
        future.set_result(None)
        return future

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        num = request.sampling.max_tokens
        mine: asyncio.Queue[int] = asyncio.Queue()
        await self._sit(mine)
        try:
            for _ in range(num):
                token = await mine.get()
                yield Chunk(chr(token - FIRST_BYTE), (token,))
            yield Chunk("", finish_reason="length", usage=Usage(len(request.prompt_ids), num))
        finally:
            self._seated.remove(mine)
            async with self._condition():
                self._condition().notify()

    async def _sit(self, mine: asyncio.Queue[int]) -> None:
        self._num_waiting += 1
        try:
            async with self._condition():
                while len(self._seated) >= self.seats:
                    await self._condition().wait()
                self._seated.append(mine)
        finally:
            self._num_waiting -= 1
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())

    def _condition(self) -> asyncio.Condition:
        loop = asyncio.get_running_loop()
        if self._room is None or self._loop is not loop:
            self._room, self._loop = asyncio.Condition(), loop
        return self._room

    async def _step(self) -> None:
        due = time.monotonic()
        while self._seated:
            seated = list(self._seated)
            took_s = len(seated) / (self.rate * self.slow)
            due += took_s
            await asyncio.sleep(due - time.monotonic())
            for queue in seated:
                queue.put_nowait(FIRST_BYTE + ord("a") + self._num_steps % 26)
            self._num_tokens += len(seated)
            self._num_steps += 1
            self._compute_s += took_s
            due = max(due, time.monotonic() - 1.0)  # after a stop of the process: do not catch up on everything


def main(settings: StubSettings) -> None:
    """Serve until SIGTERM."""
    backend = FixedRate(settings)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(backend, "slow", 0.5))
    signal.signal(signal.SIGUSR2, lambda *_: setattr(backend, "slow", 1.0))
    listening = GatewaySettings(
        host=settings.host,
        port=settings.port,
        access_log=False,
        api_keys=(hash_key(settings.key),) if settings.key else (),
        drain_s=settings.drain_s,
        max_concurrent=settings.max_concurrent,
        cache={"enabled": False},
        queue_above_rps=1e9,
    )
    app = create_app(backend, ByteTokenizer(), listening, seats=settings.seats)
    member = _member(settings, backend) if settings.consul else None

    def on_ready(url: str) -> None:
        if member is not None:
            member.start(url)
        print(url, flush=True)

    serve(app, listening, on_ready=on_ready, on_stop=member.stop if member else None)


def _member(settings: StubSettings, backend: FixedRate) -> Member:
    place = MemberSettings(
        service=settings.service,
        name=settings.name or f"stub-{settings.port}",
        address=settings.host,
        port=settings.port,
        ttl_s=settings.ttl_s,
        beat_s=settings.beat_s,
        leave_s=settings.leave_s,
    )
    speed = Speed(asyncio.run(calibrate(backend, [1, 2, 3], seats=settings.seats, max_s=0.5)))
    about = About(settings.version, settings.seats, settings.weight)
    consul = ConsulSettings(url=settings.consul, token=settings.token)
    member = Member(place, consul, backend, about, speed, adapt=backend)
    member.check()
    return member


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    main(StubSettings(**json.loads(sys.argv[1])))
