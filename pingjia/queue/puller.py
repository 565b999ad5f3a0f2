"""Feeds a backend from a queue: claims what it has seats for, sends the chunks back, says that it lives, drains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from time import monotonic
from typing import cast

from pingjia.queue.job import Claim, End
from pingjia.queue.policy import Pace
from pingjia.queue.protocol import Queue, QueueLost, WorkerCard
from pingjia.queue.shares import Shares
from pingjia.trace import NO_TRACER, Tracer, traced
from pingjia.types import Backend, Chunk, Request

log = logging.getLogger("pingjia.queue")

_WAIT_S = 1.0
_RECOVER_S = 0.2
_LOOK_S = 0.1
_SENDS_PER_S = 400  # of all answers together: each piece costs the server and every gateway about a millisecond


class Puller:
    """One backend's hands in a queue. `run` goes on until `drain`; both on one event loop.

    seats: answers the backend computes at once. beat_s: a third of the queue's lease or less.
    """

    def __init__(
        self,
        queue: Queue,
        backend: Backend,
        *,
        name: str,
        seats: int,
        beat_s: float,
        clock: Callable[[], float] = monotonic,
        on_claim: Callable[[Claim], None] = lambda claim: None,
        on_end: Callable[[End], None] = lambda end: None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.name = name
        self.seats = seats
        self.pace = Pace()
        self._queue = queue
        self._backend = backend
        self._beat_s = beat_s
        self._clock = clock
        self._on_claim = on_claim
        self._on_end = on_end
        self._tracer = tracer
        self._shares = Shares(clock)
        self.is_lost = False
        self._running: dict[str, tuple[Claim, asyncio.Task[None]]] = {}
        self._freed = asyncio.Event()
        self._is_draining = False

    async def run(self) -> None:
        """Claim and answer until drained."""
        beating = asyncio.create_task(self._beat_always())
        try:
            while not self._is_draining:
                await self._fill()
            while self._running:
                await self._until_freed(_WAIT_S)
        finally:
            beating.cancel()
            await asyncio.gather(beating, *(task for _, task in self._running.values()), return_exceptions=True)
            with suppress(QueueLost):
                await self._queue.leave(self.name)

    async def drain(self, drain_s: float) -> None:
        """Claim nothing more, let what is in work finish for `drain_s`, give the rest back to the queue."""
        self._is_draining = True
        self._freed.set()
        end = self._clock() + drain_s
        while self._running and self._clock() < end:
            await self._until_freed(max(0.0, end - self._clock()))
        for claim, task in list(self._running.values()):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with suppress(QueueLost):
                await self._queue.give_back(claim)

    async def _fill(self) -> None:
        free = self.seats - len(self._running)
        if free <= 0 or not self._backend.is_ready():
            await self._until_freed(_WAIT_S if free <= 0 else _RECOVER_S)
            return
        try:
            claims = await self._queue.claim(self.name, free, _WAIT_S)
        except QueueLost:
            await asyncio.sleep(_RECOVER_S)
            return
        for claim in claims:
            self._on_claim(claim)
            self._tell_wait(claim)
            self._running[claim.job.id] = (claim, asyncio.create_task(self._answer(claim)))

    def _tell_wait(self, claim: Claim) -> None:
        """The span of its wait, from its submission to now, by the queue's clock."""
        if self._tracer.is_on:
            waited_s = max(0.0, claim.job.deadline_s - claim.left_s)
            with self._tracer.span("wait", claim.job.request.trace, kind="consumer", ago_s=waited_s) as span:
                span.set(pingjia__worker=self.name, pingjia__delivery=claim.delivery)

    def _stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        chunks = self._backend.stream(request)
        if self._tracer.is_on:
            chunks = traced(chunks, self._tracer, request.trace)
        return cast(AsyncGenerator[Chunk, None], chunks)

    async def _until_freed(self, wait_s: float) -> None:
        self._freed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._freed.wait()

    async def _answer(self, claim: Claim) -> None:
        started, entered = self._clock(), self._shares.enter(1)
        try:
            async with asyncio.timeout(max(0.001, claim.left_s)):
                await self._relay(claim, entered)
            self.pace.add(claim.job.cost, self._clock() - started)
        except TimeoutError:
            end = End("expired", "it was not complete before its deadline", share_s=self._shares.since(entered))
            await self._end(claim, 1_000_000, (), end, 0)
        except QueueLost:
            log.warning("request %s: the queue is out of reach; another worker will take it over", claim.job.id)
        finally:
            self._shares.leave(1, entered)
            if self._running.get(claim.job.id, (None,))[0] is claim:
                del self._running[claim.job.id]
            self._freed.set()

    async def _relay(self, claim: Claim, entered: float) -> None:
        """Chunks that come while others are being sent go together with the next."""
        news: asyncio.Queue[Chunk | End] = asyncio.Queue()
        sent_at = -1e9
        pump = asyncio.create_task(self._pump(claim, news))
        seq, num_tokens = 0, 0
        try:
            while True:
                items = await _gather(news, until=sent_at + len(self._running) / _SENDS_PER_S, clock=self._clock)
                chunks = tuple(item for item in items if isinstance(item, Chunk))
                num_tokens = max(num_tokens + sum(len(c.token_ids) for c in chunks), *(_counted(c) for c in chunks), 0)
                seq += 1
                last = items[-1]
                if isinstance(last, End):
                    last = replace(last, share_s=round(self._shares.since(entered), 6))
                    await self._end(claim, seq, chunks, last, claim.job.request.num_prompt + num_tokens)
                    return
                sent_at = self._clock()
                if not await self._queue.publish(claim, seq, chunks):
                    return
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(self, claim: Claim, news: asyncio.Queue[Chunk | End]) -> None:
        """The backend's chunks, then how it ended."""
        end = End("done")
        try:
            async with aclosing(self._stream(claim.job.request)) as stream:
                async for chunk in stream:
                    if chunk.finish_reason in ("error", "cancelled"):
                        end = _broken(chunk)
                        break
                    news.put_nowait(chunk)
        except Exception as e:
            end = End.of(e)
            if end.error == "engine":
                log.exception("request %s failed", claim.job.id)
        news.put_nowait(end)

    async def _end(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...], end: End, spent: int) -> None:
        if await self._queue.end(claim, seq, chunks, end, spent):
            self._on_end(end)

    async def _beat_always(self) -> None:
        while True:
            try:
                for job_id in await self._queue.beat(self._card(), [claim for claim, _ in self._running.values()]):
                    if job_id in self._running:
                        self._running[job_id][1].cancel()
                self.is_lost = False
            except QueueLost:
                self.is_lost = True
                log.warning("worker %s: the queue is out of reach", self.name)
            except Exception:
                log.exception("worker %s: a beat failed", self.name)
            await self._until_beat()

    async def _until_beat(self) -> None:
        """Until it is time for the next beat, or there is something new to say: the backend froze, or came back."""
        was_ready, until = self.is_ready(), self._clock() + self._beat_s
        while self.is_ready() == was_ready and self._clock() < until:
            await asyncio.sleep(min(_LOOK_S, self._beat_s))

    def is_ready(self) -> bool:
        """Whether a request that is claimed now would be begun."""
        return self._backend.is_ready() and not self._is_draining

    def _card(self) -> WorkerCard:
        pace = self.pace.units_per_s
        return WorkerCard(
            self.name,
            self.seats,
            is_ready=self.is_ready(),
            units_per_s=None if pace is None else pace * self.seats,
            models=tuple(self._backend.models()),
            stats=self._backend.stats(),
        )


def _counted(chunk: Chunk) -> int:
    """Tokens of the answer where its server tells their number only."""
    return 0 if chunk.usage is None else chunk.usage.completion_tokens


async def _gather(news: asyncio.Queue[Chunk | End], *, until: float, clock: Callable[[], float]) -> list[Chunk | End]:
    """What came: at least one item, and all up to a time on the clock, or up to the end."""
    items = [await news.get()]
    while True:
        while not news.empty():
            items.append(news.get_nowait())
        left_s = until - clock()
        if left_s <= 0 or isinstance(items[-1], End):
            return items
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                items.append(await news.get())


def _broken(last: Chunk) -> End:
    if last.finish_reason == "cancelled":
        return End("cancelled", last.error or "the worker ended this answer before it was complete; ask again")
    return End("failed", last.error or "the engine failed while it answered; try again", "engine")
