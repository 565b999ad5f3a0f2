"""Requests that nobody waits for: taken on with 202, asked for later. They lie in the queue, and so does their answer.

Over Redis they outlive every gateway and worker; in one process, they end with it. Not here: batches (`batches.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pingjia.gateway import chat, completions
from pingjia.gateway.answer import Answer
from pingjia.gateway.ask import Ask
from pingjia.gateway.errors import IdempotencyConflict, JobNotFound, NotReady, describe
from pingjia.gateway.job_accounts import JobAccounts, Post
from pingjia.gateway.responses import ErrorBody, JobOut
from pingjia.gateway.roads import with_seeds
from pingjia.gateway.service import Caller, Service
from pingjia.gateway.tools import Toolbox
from pingjia.queue.job import End, Job, JobStatus
from pingjia.types import ModelCard, Request, Sampling

log = logging.getLogger("pingjia.gateway")

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What must be known to write the answer later. The answer itself lies with its requests."""

    id: str
    kind: Kind
    ask_id: str
    model: str
    num_prompts: int
    n: int
    logprobs: int | None
    created: int
    request_id: str
    key_id: str
    digest: str  # of the body it was asked with
    tool_names: tuple[str, ...] = ()
    max_calls: int | None = None

    @property
    def request_ids(self) -> list[str]:
        return [f"{self.ask_id}-{i}" for i in range(self.num_prompts * self.n)]

    @property
    def ask(self) -> Ask:
        """As much of what was asked as the answer's form needs."""
        sampling, card = Sampling(logprobs=self.logprobs), ModelCard(self.model, "")
        toolbox = Toolbox(names=tuple(self.tool_names), at_most=self.max_calls)
        return Ask(self.ask_id, card, ("",) * self.num_prompts, sampling, self.n, toolbox=toolbox)


class Jobs:
    """Takes on, tells, cancels. One per app; lives on the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._queue = service.roads.queue
        self._keep_s = service.settings.result_s
        self.accounts = JobAccounts(
            self._queue,
            service.roads.queued.owner,
            self._answer_to,
            service.append,
            service.metrics.on_share,
            look_s=service.settings.queue_lease_s / 2,
        )

    async def accept(self, ask: Ask, kind: Kind, caller: Caller, body: bytes, idempotency_key: str) -> JobOut:
        """Take the request on, once for each idempotency key. Raises like `Service.answering` before an answer."""
        if not self._service.takes_on():
            raise NotReady("the server is stopping; ask another one")
        ask = replace(ask, id=f"async-{uuid.uuid4().hex}")
        record, mark = _record(ask, kind, caller, body), ""
        if idempotency_key:
            mark = hashlib.sha256(json.dumps([caller.key.owner, idempotency_key]).encode()).hexdigest()
            there = await self._first(mark, record, caller)
            if await self._queue.status(there.request_ids[0]) is not None:
                return await self._describe(there, with_result=False)
            # Never taken on: this is the first, or the one before it got no further than its mark.
            record, ask = there, replace(ask, id=there.ask_id)
        try:
            await self._submit(ask, caller)
        except BaseException:
            if mark:
                await self._queue.remove("same", mark)
            raise
        await self._queue.save("job", record.id, _dump(record), tenant=caller.key.owner, keep_s=2 * self._keep_s)
        await self.accounts.open(_post(record, self.accounts.gateway))
        return await self._describe(record, with_result=False)

    async def get(self, job_id: str, caller: Caller) -> JobOut:
        """The state of a job, and its result if it has one. Raises JobNotFound, also for another tenant's."""
        return await self._describe(await self._find(job_id, caller), with_result=True)

    async def cancel(self, job_id: str, caller: Caller) -> JobOut:
        """End it if it has not ended, and say how it stands."""
        record = await self._find(job_id, caller)
        for request_id in record.request_ids:
            await self._queue.cancel(request_id, "cancelled by its client")
        return await self._describe(record, with_result=True)

    async def close(self) -> None:
        """Stop waiting for the ends of jobs."""
        await self.accounts.close()

    # ---- inside

    async def _submit(self, ask: Ask, caller: Caller) -> None:
        service = self._service
        async with service.guard.visit(caller.key, ask.card.id, ask.num_choices, caller.headers) as visit:
            requests = await service.requests(ask)
            await service.guard.reserve(visit, requests)
            await self._queue.submit([self._job(request, caller) for request in with_seeds(requests)])
            visit.num_used = visit.num_reserved  # how many it takes will be known when its minute is over

    def _job(self, request: Request, caller: Caller) -> Job:
        return Job(request, caller.key_id, caller.rank, self._keep_s, self._keep_s)

    async def _first(self, mark: str, record: JobRecord, caller: Caller) -> JobRecord:
        """The job that was first asked for under this mark, which may be this one. Raises IdempotencyConflict."""
        text = await self._queue.add("same", mark, _dump(record), tenant=caller.key.owner, keep_s=self._keep_s)
        there = record if text is None else JobRecord(**json.loads(text))
        if there.digest != record.digest:
            raise IdempotencyConflict(
                f"job {there.id} was asked for with the same Idempotency-Key and another body; use another key"
            )
        return there

    async def _find(self, job_id: str, caller: Caller) -> JobRecord:
        text = await self._queue.load("job", job_id, tenant=caller.key.owner)
        if text is None:
            raise JobNotFound(f"no job {job_id[:80]!r}; results are kept for {self._keep_s:.0f} s after their end")
        return JobRecord(**json.loads(text))

    async def _describe(self, record: JobRecord, *, with_result: bool) -> JobOut:
        states = [await self._queue.status(request_id) for request_id in record.request_ids]
        state, end = _overall(states)
        out = JobOut(id=record.id, object="job", status=state, created_at=record.created, model=record.model)
        if end is not None and (error := end.exception()) is not None and state == "failed":
            out.error = ErrorBody(**describe(error).envelope()["error"])
        if state == "completed" and with_result:
            out.result = await self._result(record)
        return out

    async def _result(self, record: JobRecord) -> dict[str, Any]:
        answer = self._answer(record)
        try:
            whole = _shape(record, self._service).whole(await answer.completions(), answer.usage)
        finally:
            await answer.close()
        return {**json.loads(whole.dump()), "created": record.created}

    def _answer(self, record: JobRecord) -> Answer:
        return self._answer_to(record.request_ids, record.n)

    def _answer_to(self, request_ids: Sequence[str], n: int) -> Answer:
        requests = [Request(request_id, (), Sampling()) for request_id in request_ids]
        deadline = asyncio.get_running_loop().time() + self._keep_s
        backend, clock = self._service.roads.queued, self._service.clock
        return Answer(backend, requests, choices_per_prompt=n, deadline=deadline, clock=clock)


def _record(ask: Ask, kind: Kind, caller: Caller, body: bytes) -> JobRecord:
    return JobRecord(
        id=f"job-{uuid.uuid4().hex}",
        kind=kind,
        ask_id=ask.id,
        model=ask.card.id,
        num_prompts=len(ask.prompts),
        n=ask.n,
        logprobs=ask.sampling.logprobs,
        created=int(time.time()),
        request_id=caller.request_id,
        key_id=caller.key_id,
        digest=hashlib.sha256(body).hexdigest(),
        tool_names=ask.toolbox.names,
        max_calls=ask.toolbox.at_most,
    )


def _post(record: JobRecord, gateway: str) -> Post:
    return Post(
        record.id, gateway, tuple(record.request_ids), record.n, record.model, record.key_id, asked_at=time.time()
    )


def _dump(record: JobRecord) -> str:
    return json.dumps(asdict(record))


def _overall(states: Sequence[JobStatus | None]) -> tuple[str, End | None]:
    """One word for all requests of a job, and the end that decided it."""
    known = [status for status in states if status is not None]
    ends = [status.end for status in known if status.end is not None]
    bad = next((end for end in ends if end.kind != "done"), None)
    if bad is not None:
        return ("cancelled" if bad.kind == "cancelled" else "failed"), bad
    if len(known) < len(states):
        return "failed", End("abandoned", "the answer is not kept any more; ask again", "engine")
    if len(ends) == len(states):
        return "completed", None
    return ("running" if any(status.state != "waiting" for status in known) else "queued"), None


def _shape(record: JobRecord, service: Service) -> chat.ChatShape | completions.CompletionShape:
    make = chat.ChatShape if record.kind == "chat" else completions.CompletionShape
    return make(record.ask, service.tokenizer, include_usage=False)
