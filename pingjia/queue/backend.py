"""A queue as a gateway sees it: `pingjia.types.Backend`. What its workers say of themselves is a second old at most."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import fields, replace
from typing import cast

from pingjia.queue.job import End, Job, Part
from pingjia.queue.protocol import Queue, QueueLost, QueueStats
from pingjia.queue.replay import Replay
from pingjia.types import Chunk, EngineStats, ModelCard, Request

log = logging.getLogger("pingjia.queue")

_GONE = "its client left"


class QueueBackend:
    """`keep_watch` must run as long as this is used; until its first look there are no models and nothing is ready."""

    def __init__(self, queue: Queue, *, owner: str, watch_s: float = 0.5) -> None:
        self.queue = queue
        self.owner = owner
        self.snapshot = QueueStats()
        self.is_lost = False
        self._watch_s = watch_s
        self._models: list[ModelCard] = []
        self._wanted: set[str] = set()  # submitted here, not ended

    async def keep_watch(self) -> None:
        """Look at the queue again and again, and tell it that this gateway is there. Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._watch_s)

    async def look(self) -> None:
        """Look once."""
        try:
            await self.queue.alive(self.owner)
            self.snapshot = await self.queue.stats()
            self.is_lost = False
        except QueueLost as e:
            if not self.is_lost:
                log.error("%s", e)
            self.is_lost = True
        except Exception:
            log.exception("the queue could not be looked at")

    def models(self) -> list[ModelCard]:
        """What every worker serves: a request may go to any of them. Without workers, what they served last."""
        cards = [worker.models for worker in self.snapshot.workers if worker.models]
        if cards:
            common = set.intersection(*({card.id for card in models} for models in cards))
            self._models = [_agreed(card, cards) for card in cards[0] if card.id in common]
        return self._models

    def stats(self) -> EngineStats:
        """The sum over the workers; seconds_since_step is the smallest."""
        return _sum([worker.stats for worker in self.snapshot.workers])

    def is_ready(self) -> bool:
        """Whether a worker could begin."""
        return not self.is_lost and any(worker.is_ready for worker in self.snapshot.workers)

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Take these on for clients that wait; `cancel` must follow. Raises like `Queue.submit`."""
        self._wanted |= {job.id for job in jobs}
        try:
            await self.queue.submit(jobs)
        except QueueLost:
            raise  # it may have been taken on all the same: `cancel` sees to it
        except BaseException:
            self._wanted -= {job.id for job in jobs}
            raise

    async def cancel(self, jobs: Sequence[Job]) -> None:
        """End what of these has not ended: nobody waits any more."""
        for job in jobs:
            if job.id in self._wanted:
                self._wanted.discard(job.id)
                with suppress(QueueLost):
                    await self.queue.cancel(job.id, _GONE)

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """The answer to a request that was submitted, from its first chunk on, each once.

        Closing the iterator cancels nothing: that is for whoever submitted it.
        """
        replay = Replay()
        async with aclosing(cast(AsyncGenerator[Part, None], self.queue.follow(request.id))) as parts:
            async for part in parts:
                if part.end is not None:
                    self._wanted.discard(request.id)
                for chunk in replay.take(part):
                    yield chunk
                if part.end is not None:
                    for chunk in _last(part.end):
                        yield chunk


def _agreed(card: ModelCard, cards: Sequence[Sequence[ModelCard]]) -> ModelCard:
    """The card, without its digest where workers have other weights under the name: any of them may answer."""
    digests = {other.digest for models in cards for other in models if other.id == card.id}
    return card if len(digests) == 1 else replace(card, digest="")


def _last(end: End) -> list[Chunk]:
    """What a reader sees of an end that is no answer. Raises what the worker raised."""
    if end.kind == "cancelled":
        return [Chunk(finish_reason="cancelled", error=end.message)]
    error = end.exception()
    if error is not None:
        raise error
    return []


def _sum(all_stats: Sequence[EngineStats]) -> EngineStats:
    if not all_stats:
        return EngineStats()
    names = [field.name for field in fields(EngineStats) if field.name != "seconds_since_step"]
    values = {name: sum(getattr(stats, name) for stats in all_stats) for name in names}
    return EngineStats(**values, seconds_since_step=min(stats.seconds_since_step for stats in all_stats))
