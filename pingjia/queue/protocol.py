"""What every queue promises. The same tests hold for all of them: tests/queue/test_queue.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pingjia.errors import PingjiaError
from pingjia.queue.job import Claim, End, Job, JobStatus, Part
from pingjia.types import Chunk, EngineStats, ModelCard


class QueueLost(PingjiaError):
    """The server behind the queue does not answer. HTTP 503."""


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What a worker says of itself with every beat. units_per_s: measured, of all its seats; None before."""

    name: str
    seats: int
    is_ready: bool = True
    units_per_s: float | None = None
    models: tuple[ModelCard, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> WorkerCard:
        """What `dump` wrote."""
        row: dict[str, Any] = json.loads(text)
        models = tuple(ModelCard(**card) for card in row.pop("models"))
        return cls(**{**row, "models": models, "stats": EngineStats(**row["stats"])})


@dataclass(frozen=True, slots=True)
class QueueStats:
    """A snapshot. `ended` counts the jobs by how they ended, `num_redelivered` those taken over from dead workers.

    oldest_s: since the submission of the request that waits longest.
    """

    num_waiting: int = 0
    units_waiting: int = 0
    num_claimed: int = 0
    num_tenants: int = 0
    workers: tuple[WorkerCard, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    num_redelivered: int = 0
    oldest_s: float = 0.0


class Queue(Protocol):
    """Jobs in, claims out; parts of answers in, followers out. Every job ends exactly once.

    Everything may be called again after a failure: submitting, publishing and ending are idempotent.
    Raises QueueLost when what is behind it stays away.
    """

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Take on all of these or none; those whose id is known already are taken on already.

        The jobs are of one tenant and rank. Raises Overloaded or ShareExceeded.
        """
        ...

    async def claim(self, worker: str, num: int, wait_s: float) -> list[Claim]:
        """Up to `num` jobs, first those of dead workers, else the next in turn; waits for the first up to `wait_s`."""
        ...

    async def beat(self, card: WorkerCard, claims: Sequence[Claim]) -> set[str]:
        """The worker lives and still works on these. Returns the ids of those it should stop."""
        ...

    async def publish(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...]) -> bool:
        """Append to the answer; seq counts 1, 2, ... within a delivery. False: the claim is over, stop."""
        ...

    async def end(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...], end: End, spent: int) -> bool:
        """The last of the answer, and how the job ended: acknowledged. `spent`: tokens it really took.

        False: it had ended before, or is in other hands.
        """
        ...

    async def give_back(self, claim: Claim) -> None:
        """Not finished, and nobody died: the job waits again, at its old place."""
        ...

    async def leave(self, worker: str) -> None:
        """The worker is gone on purpose."""
        ...

    async def cancel(self, job_id: str, message: str) -> bool:
        """End it as cancelled, wherever it is. False: there is none, or it had ended."""
        ...

    def follow(self, job_id: str) -> AsyncIterator[Part]:
        """The parts of its answer from the first on, as they come, up to the one with the end.

        Parts of an abandoned delivery may come before those of the one that took over: see `replay`. Of a job that is
        not known (any more), an end of the kind "abandoned".
        """
        ...

    async def status(self, job_id: str) -> JobStatus | None:
        """What is known of a job; None: nothing."""
        ...

    async def alive(self, owner: str) -> None:
        """The gateway of that name is there; jobs of an owner that is not are not begun."""
        ...

    async def is_heard(self, owner: str) -> bool:
        """Whether a gateway of that name was there within the lease."""
        ...

    async def stats(self) -> QueueStats: ...

    async def close(self) -> None:
        """Let go of connections. What waits, stays."""
        ...


class Records(Protocol):
    """Small documents that outlive a request: of a kind, by id, owned by a tenant."""

    async def save(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> None: ...

    async def add(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> str | None:
        """Save it unless there is one: then return that."""
        ...

    async def remove(self, kind: str, record_id: str) -> None: ...

    async def load(self, kind: str, record_id: str, *, tenant: str) -> str | None:
        """The text; None when there is none, or it is another tenant's."""
        ...

    async def post(self, board: str, post_id: str, text: str) -> None:
        """Put it up for whoever looks at the board, until it is taken down."""
        ...

    async def posted(self, board: str) -> Mapping[str, str]:
        """What is up, by id."""
        ...

    async def take_down(self, board: str, post_id: str) -> bool:
        """True for the one who did; False when it was not up any more."""
        ...
