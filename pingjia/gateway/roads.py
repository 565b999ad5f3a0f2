"""The two roads of a request: straight to the backend in this process, or through the queue. Which one, and its gates.

A queue costs a little time and gives order: fairness between keys, ranks, deadlines, workers elsewhere. Below
`queue_above_rps` nobody needs that. What is asked for asynchronously always takes the queue.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from pingjia.gateway.admission import Admission
from pingjia.gateway.answer import Source
from pingjia.gateway.metrics import Metrics
from pingjia.gateway.settings import GatewaySettings
from pingjia.queue.backend import QueueBackend
from pingjia.queue.job import Claim, Job, Rank
from pingjia.queue.opening import Shelf
from pingjia.queue.policy import ArrivalRate, Limits
from pingjia.queue.puller import Puller
from pingjia.trace import NO_SPAN, NO_TRACER, Span, Tracer, traced
from pingjia.types import Backend, Chunk, Request

Road = Literal["direct", "queue"]


@dataclass(frozen=True, slots=True)
class Turn:
    """In whose name and how urgently something is asked. deadline_s: from now."""

    tenant: str
    rank: Rank
    deadline_s: float
    span: Span = NO_SPAN


@dataclass(frozen=True, slots=True)
class _Traced:
    """The backend of this process, telling what it does as spans within `span`."""

    backend: Backend
    tracer: Tracer
    span: Span

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        carrier = self.span.carrier
        return traced(self.backend.stream(replace(request, trace=carrier)), self.tracer, carrier)


def limits_of(settings: GatewaySettings) -> Limits:
    """The queue's part of the settings."""
    return Limits(
        max_requests=settings.queue_max_requests,
        max_units=settings.queue_max_tokens,
        lease_s=settings.queue_lease_s,
        max_deliveries=settings.queue_max_deliveries,
    )


class Roads:
    """`backend` computes in this process; None: all work is done elsewhere. `seats`: answers it computes at once."""

    def __init__(
        self,
        backend: Backend | None,
        queue: Shelf,
        settings: GatewaySettings,
        *,
        seats: int,
        clock: Callable[[], float],
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.tracer = tracer
        name = f"{secrets.token_hex(6)}"
        self.queued = QueueBackend(queue, owner=f"gateway-{name}", watch_s=min(0.5, settings.queue_lease_s / 4))
        self.queue = queue
        self.metrics = Metrics(backend if backend is not None else self.queued)
        self.admission = Admission(settings.max_concurrent)
        self.arrivals = ArrivalRate()
        self.num_taken = {"direct": 0, "queue": 0}
        self._backend = backend
        self._settings = settings
        self._clock = clock
        beat_s = min(1.0, settings.queue_lease_s / 4)
        self._puller = (
            Puller(
                queue,
                backend,
                name=f"serve-{name}",
                seats=seats,
                beat_s=beat_s,
                clock=clock,
                on_claim=self._on_claim,
                tracer=tracer,
            )
            if backend is not None
            else None
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _on_claim(self, claim: Claim) -> None:
        models = self.known.models()
        name = claim.job.request.adapter or (models[0].id if models else "")
        self.metrics.on_claim(name, max(0.0, claim.job.deadline_s - claim.left_s))

    # ---- life

    async def start(self) -> None:
        """Begin to watch the queue and to feed the backend of this process from it."""
        await self.queued.look()
        self._tasks.append(asyncio.create_task(self.queued.keep_watch()))
        if self._puller is not None:
            self._tasks.append(asyncio.create_task(self._puller.run()))

    async def stop(self) -> None:
        """Give back what is still in work, and let go of the queue."""
        if self._puller is not None:
            await self._puller.drain(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.queued.queue.close()

    @property
    def known(self) -> Backend:
        """Who says what can be asked for and whether it could be answered: the backend, or all workers together."""
        return self._backend if self._backend is not None else self.queued

    # ---- a request

    def choose(self, *, must_queue: bool = False) -> Road:
        """The road of a request that comes now."""
        now = self._clock()
        self.arrivals.add(now)
        if must_queue or self._backend is None or self._settings.queue_above_rps == 0:
            return "queue"
        return "queue" if self.arrivals.per_s(now) > self._settings.queue_above_rps else "direct"

    @asynccontextmanager
    async def slots(self, road: Road, num: int) -> AsyncIterator[None]:
        """Room for `num` answers on the direct road. Raises Overloaded. The queue has its own bounds."""
        if road == "queue":
            yield
            return
        self.admission.take(num)
        try:
            yield
        finally:
            self.admission.give(num)

    @asynccontextmanager
    async def open(self, road: Road, requests: Sequence[Request], turn: Turn) -> AsyncIterator[Source]:
        """Who answers these requests. Raises Overloaded, ShareExceeded or QueueLost."""
        self.num_taken[road] += 1
        with turn.span.child(road) as span:
            if road == "direct":
                assert self._backend is not None
                yield _Traced(self._backend, self.tracer, span) if self.tracer.is_on else self._backend
                return
            jobs = [self._job(request, turn, span) for request in with_seeds(requests)]
            try:
                await self.queued.submit(jobs)
                yield self.queued
            finally:
                await asyncio.shield(self.queued.cancel(jobs))

    def _job(self, request: Request, turn: Turn, span: Span) -> Job:
        request = replace(request, trace=span.carrier)
        return Job(request, turn.tenant, turn.rank, turn.deadline_s, owner=self.queued.owner)


def with_seeds(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The same requests, each with a seed: so that a second worker gives the answer that the first one began."""
    return tuple(
        request
        if request.sampling.seed is not None or request.sampling.temperature == 0
        else replace(request, sampling=replace(request.sampling, seed=secrets.randbits(31)))
        for request in requests
    )
