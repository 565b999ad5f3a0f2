"""Chunks of several requests -> whole answers, in the order of the requests. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pingjia.errors import EngineError
from pingjia.types import Chunk, Completion, Request, Usage

OnDone = Callable[[int, Completion], None]


class Completions:
    """Collects what comes for the requests; `on_done(index, completion)` is called as each one ends."""

    def __init__(self, requests: Sequence[Request], on_done: OnDone | None = None) -> None:
        self._place = {request.id: index for index, request in enumerate(requests)}
        self._chunks: list[list[Chunk]] = [[] for _ in requests]
        self._answers: dict[int, Completion] = {}
        self._on_done = on_done

    def take(self, request_id: str, chunk: Chunk) -> None:
        index = self._place[request_id]
        self._chunks[index].append(chunk)
        if chunk.finish_reason is not None:
            self._answers[index] = _join(self._chunks[index])
            if self._on_done is not None:
                self._on_done(index, self._answers[index])

    def all(self) -> list[Completion]:
        """The answers, once every request has ended. Raises EngineError when one has failed."""
        errors = [answer[-1].error for answer in self._chunks if answer[-1].finish_reason == "error"]
        if errors:
            raise EngineError(f"{len(errors)} of {len(self._chunks)} answers failed, the first because {errors[0]}")
        return [self._answers[index] for index in range(len(self._chunks))]


def _join(chunks: list[Chunk]) -> Completion:
    last = chunks[-1]
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or "error",
        usage=last.usage or Usage(),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )
