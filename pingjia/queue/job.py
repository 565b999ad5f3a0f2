"""What lies in a queue: jobs, pieces of their answers, their ends; and all of it as JSON text. Plain data only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from pingjia.errors import (
    EngineError,
    ModelNotFound,
    Overloaded,
    PingjiaError,
    PromptTooLong,
    RequestError,
    UpstreamBusy,
    UpstreamFailed,
)
from pingjia.types import Chunk, Request, TokenLogprob, Usage

Rank = Literal["high", "normal", "low"]
EndKind = Literal["done", "failed", "cancelled", "expired", "abandoned"]
JobState = Literal["waiting", "claimed", "ended"]


@dataclass(frozen=True, slots=True)
class Job:
    """One backend request that may wait. Its `id` is the request's: submitting it twice is submitting it once.

    tenant: whose share it takes. deadline_s: counted from its submission; then it ends as `expired`. keep_s: how long
    its answer can be read after its end. owner: the gateway whose client waits for it, "" when nobody has to; a job
    whose owner is gone is not begun.
    """

    request: Request
    tenant: str = ""
    rank: Rank = "normal"
    deadline_s: float = 600.0
    keep_s: float = 60.0
    owner: str = ""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def cost(self) -> int:
        """Tokens it may take: its prompt and its longest answers."""
        return self.request.num_prompt + self.request.sampling.max_tokens * self.request.sampling.n


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in a worker's hands. `delivery` counts the hands it was in; what an earlier one still sends is refused."""

    job: Job
    delivery: int
    left_s: float


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended, once. `error` names the exception that a waiting client gets; "" for none.

    share_s: its part of the worker's time, in which several jobs share every second.
    """

    kind: EndKind
    message: str = ""
    error: str = ""
    param: str | None = None
    code: str | None = None
    share_s: float = 0.0

    @classmethod
    def of(cls, exc: Exception) -> End:
        """The end of a job whose backend raised. What nobody wrote on purpose is not shown."""
        if isinstance(exc, RequestError):
            return cls("failed", str(exc), _NAMES.get(type(exc), "request"), exc.param, exc.code)
        if isinstance(exc, UpstreamBusy):
            return cls("failed", str(exc), "busy", str(exc.status), f"{exc.retry_after_s:.3f}")
        if isinstance(exc, Overloaded):
            return cls("failed", str(exc), "overloaded", code=f"{exc.retry_after_s:.3f}")
        if isinstance(exc, PingjiaError):
            return cls("failed", str(exc), "upstream" if isinstance(exc, UpstreamFailed) else "engine")
        return cls("failed", f"the worker failed ({type(exc).__name__}); its log has the details", "engine")

    def exception(self) -> Exception | None:
        """What to raise for a client that waits; None for an end with an answer."""
        if self.kind == "done":
            return None
        if self.error == "model":
            return ModelNotFound(self.message)
        if self.error == "length":
            return PromptTooLong(self.message, param=self.param or "messages")
        if self.error == "request":
            return RequestError(self.message, param=self.param, code=self.code)
        if self.error == "busy":
            return UpstreamBusy(self.message, retry_after_s=float(self.code or 1.0), status=int(self.param or 503))
        if self.error == "upstream":
            return UpstreamFailed(self.message)
        if self.error == "overloaded":
            return Overloaded(self.message, retry_after_s=float(self.code or 1.0))
        if self.kind == "expired" or (self.kind == "abandoned" and not self.error):
            return Overloaded(self.message, retry_after_s=1.0)
        return EngineError(self.message)


_NAMES: dict[type[RequestError], str] = {ModelNotFound: "model", PromptTooLong: "length"}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer as it lies in the queue: in order of (delivery, seq); only the last one has `end`."""

    delivery: int
    seq: int
    chunks: tuple[Chunk, ...] = ()
    end: End | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is known of a job. `deaths`: workers that died over it."""

    state: JobState
    tenant: str
    deaths: int = 0
    end: End | None = None


@cache
def _jobs() -> TypeAdapter[Job]:
    return TypeAdapter(Job)


def dump_job(job: Job) -> str:
    """The job as JSON text."""
    return _jobs().dump_json(job).decode()


def load_job(text: str) -> Job:
    """The job that `dump_job` wrote."""
    return _jobs().validate_json(text)


def dump_chunks(chunks: tuple[Chunk, ...]) -> str:
    """Chunks as JSON text, short: one line per token goes through here."""
    return json.dumps([_chunk_row(c) for c in chunks], ensure_ascii=True, separators=(",", ":"))


def load_chunks(text: str) -> tuple[Chunk, ...]:
    """The chunks that `dump_chunks` wrote."""
    return tuple(_chunk_of(row) for row in json.loads(text))


def dump_end(end: End) -> str:
    """The end as JSON text."""
    return json.dumps([end.kind, end.message, end.error, end.param, end.code, end.share_s], separators=(",", ":"))


def load_end(text: str) -> End:
    """The end that `dump_end` wrote."""
    return End(*json.loads(text)[:6])


def _chunk_row(chunk: Chunk) -> list[Any]:
    usage = chunk.usage and [chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.cached_tokens]
    logprobs = [[t.token_id, t.logprob, t.top] for t in chunk.logprobs]
    row = [chunk.text, chunk.token_ids, chunk.finish_reason, usage, logprobs, chunk.error, chunk.index, chunk.foreign]
    return row[:2] if not any(row[2:]) else row


def _chunk_of(row: list[Any]) -> Chunk:
    text, ids, finish_reason, usage, logprobs, error, index, foreign = [*row, *_PLAIN_ROW[len(row) - 2 :]]
    tokens = tuple(TokenLogprob(i, p, tuple((j, q) for j, q in top)) for i, p, top in logprobs)
    return Chunk(text, tuple(ids), tokens, finish_reason, Usage(*usage) if usage else None, error, index, foreign)


_PLAIN_ROW: tuple[Any, ...] = (None, None, (), None, 0, "")
"""What a row that is only a text leaves out; a gateway of an older version leaves out the end of it."""
