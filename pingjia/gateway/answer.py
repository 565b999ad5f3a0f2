"""One HTTP request's answers while they come: the backend's streams, merged, measured, and ended exactly once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, cast

from pingjia.errors import EngineError
from pingjia.gateway.errors import AnswerCancelled, DeadlineExceeded
from pingjia.types import Chunk, Completion, FinishReason, Request, TokenLogprob, Usage

Piece = tuple[int, Chunk]
"""Index of the choice, and what came."""


class Source(Protocol):
    """What streams the answers of requests: a backend, a queue, the cache before them."""

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """As `Backend.stream`."""
        ...


@dataclass(slots=True)
class Tally:
    """What one choice has produced so far. Times are the injected clock's."""

    num_prompt: int
    num_tokens: int = 0
    num_cached: int = 0
    first_at: float | None = None
    last_at: float | None = None
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk, now: float) -> None:
        self.num_tokens += len(chunk.token_ids)
        if chunk.token_ids or chunk.text:
            self.first_at = now if self.first_at is None else self.first_at
            self.last_at = now
        if chunk.usage is not None:
            self.num_prompt, self.num_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            self.num_cached = chunk.usage.cached_tokens
        self.finish_reason = chunk.finish_reason


class Answer:
    """The choices of one request in work. Started on construction; `close` must be called, and ends what still runs.

    choices_per_prompt: neighbouring requests share a prompt, which `usage` counts once.
    """

    def __init__(
        self,
        source: Source,
        requests: Sequence[Request],
        *,
        choices_per_prompt: int,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self.tallies = [Tally(request.num_prompt) for request in requests]
        self._source = source
        self._per_prompt = choices_per_prompt
        self._deadline = deadline  # in the event loop's time
        self._clock = clock
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(i, request)) for i, request in enumerate(requests)]

    async def pieces(self, quiet_s: float | None = None) -> AsyncIterator[Piece | None]:
        """Chunks of all choices in the order they come; None whenever nothing came for `quiet_s`.

        Ends when every choice has ended. Raises EngineError, AnswerCancelled, DeadlineExceeded, or what the backend
        raised.
        """
        running = len(self.tallies)
        while running:
            piece = await self._next(quiet_s)
            if piece is not None and piece[1].finish_reason is not None:
                running -= 1
            yield piece

    async def completions(self) -> list[Completion]:
        """All choices, whole. Raises like `pieces`."""
        chunks: list[list[Chunk]] = [[] for _ in self.tallies]
        async for piece in self.pieces():
            if piece is not None:
                chunks[piece[0]].append(piece[1])
        return [_join(c, self._usage_of(tally)) for c, tally in zip(chunks, self.tallies, strict=True)]

    def fail(self, error: Exception) -> None:
        """End the answer from outside: whoever reads `pieces` gets the error next."""
        self._queue.put_nowait(error)

    async def close(self) -> None:
        """Stop what still runs; returns when every stream of the backend is closed."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def usage(self) -> Usage:
        """Tokens so far, also of an answer that was cut off."""
        prompts = self.tallies[:: self._per_prompt]
        return Usage(
            prompt_tokens=sum(t.num_prompt for t in prompts),
            completion_tokens=sum(t.num_tokens for t in self.tallies),
            cached_tokens=sum(t.num_cached for t in prompts),
        )

    async def _next(self, quiet_s: float | None) -> Piece | None:
        left = self._deadline - asyncio.get_running_loop().time()
        quiet_first = quiet_s is not None and quiet_s < left
        try:
            if self._queue.empty():
                async with asyncio.timeout(quiet_s if quiet_first else left):
                    item = await self._queue.get()
            else:  # pieces that came together: a timer for each would cost more than passing it on
                item = self._queue.get_nowait()
        except TimeoutError:
            if quiet_first:
                return None
            left = 0.0
        if left <= 0:  # also when chunks come so steadily that the wait never has to end early
            raise DeadlineExceeded("the answer was not complete in time; ask for fewer tokens or try again")
        if isinstance(item, Exception):
            raise item
        return item

    async def _pump(self, index: int, request: Request) -> None:
        try:
            # The protocol lets us close the iterator; that is what tells the engine to stop.
            stream = cast(AsyncGenerator[Chunk, None], self._source.stream(request))
            async with aclosing(stream):
                async for chunk in stream:
                    self._take(index, chunk)
                    if chunk.finish_reason is not None:
                        return
            raise EngineError("the answer broke off without an end; try again")
        except Exception as e:
            self._queue.put_nowait(e)

    def _take(self, index: int, chunk: Chunk) -> None:
        self.tallies[index].add(chunk, self._clock())
        if chunk.finish_reason == "error":
            raise EngineError(chunk.error or "the engine failed while it answered; try again")
        if chunk.finish_reason == "cancelled":
            raise AnswerCancelled("the server ended this answer before it was complete; try again")
        self._queue.put_nowait((index, chunk))

    @staticmethod
    def _usage_of(tally: Tally) -> Usage:
        return Usage(tally.num_prompt, tally.num_tokens, tally.num_cached)


def _join(chunks: Sequence[Chunk], usage: Usage) -> Completion:
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    for chunk in chunks:
        ids += chunk.token_ids
        logprobs += chunk.logprobs
    finish_reason = chunks[-1].finish_reason
    assert finish_reason is not None  # `pieces` ends only then
    text, foreign = "".join(c.text for c in chunks), _foreign(chunks)
    return Completion(text, tuple(ids), finish_reason, usage, tuple(logprobs), foreign)


def _foreign(chunks: Sequence[Chunk]) -> tuple[str, ...]:
    """What another server said, as soon as one piece of it is more than text."""
    if not any(chunk.foreign for chunk in chunks):
        return ()
    return tuple(chunk.foreign or json.dumps({"text": chunk.text}) for chunk in chunks)
