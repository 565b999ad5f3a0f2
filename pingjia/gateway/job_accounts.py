"""One fact in the ledger for each asynchronous request when it has ended, by whichever gateway lives then.

A request that was taken on is posted on a board in the queue until its fact is written. The gateway that took it on
waits for its end; when that one is dead, any other takes over what it finds posted. Whoever takes the post down
writes the fact: so there is one, whatever died, unless the writer dies between the two.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pingjia.gateway.answer import Answer
from pingjia.gateway.errors import status_of
from pingjia.ledger import Fact
from pingjia.queue.job import End
from pingjia.queue.opening import Shelf
from pingjia.queue.protocol import QueueLost
from pingjia.types import Usage

log = logging.getLogger("pingjia.gateway")

_BOARD = "unaccounted"
_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Post:
    """What must be known to account for a job. `asked_at`: UNIX time."""

    id: str
    gateway: str
    request_ids: tuple[str, ...]
    n: int
    model: str
    key_id: str
    asked_at: float


class JobAccounts:
    """Waits for ends and writes facts. `write(fact)` and `on_share(key, seconds)` get what came of it."""

    def __init__(
        self,
        queue: Shelf,
        gateway: str,
        answer_of: Callable[[Sequence[str], int], Answer],
        write: Callable[[Fact], None],
        on_share: Callable[[str, float], None],
        *,
        look_s: float,
    ) -> None:
        self.gateway = gateway
        self._queue = queue
        self._answer_of = answer_of
        self._write = write
        self._on_share = on_share
        self._look_s = look_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for what dead gateways have left."""
        self._looking = asyncio.create_task(self._look_always())

    async def open(self, post: Post) -> None:
        """Account for this one when it ends, here or elsewhere."""
        text = json.dumps([post.id, post.gateway, post.request_ids, post.n, post.model, post.key_id, post.asked_at])
        await self._queue.post(_BOARD, post.id, text)
        self._wait_for(post)

    async def close(self) -> None:
        """Stop waiting. What is posted stays, for another gateway or the next start."""
        tasks = [*self._tasks.values(), *([self._looking] if self._looking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wait_for(self, post: Post) -> None:
        task = self._tasks[post.id] = asyncio.create_task(self._account(post))
        task.add_done_callback(lambda _: self._tasks.pop(post.id, None))

    async def _look_always(self) -> None:
        while True:
            try:
                await self._look()
            except QueueLost:
                pass
            except Exception:
                log.exception("jobs of other gateways could not be looked for")
            await asyncio.sleep(self._look_s)

    async def _look(self) -> None:
        for text in (await self._queue.posted(_BOARD)).values():
            job_id, gateway, request_ids, *others = json.loads(text)
            post = Post(job_id, gateway, tuple(request_ids), *others)
            if post.id not in self._tasks and not await self._queue.is_heard(post.gateway):
                self._wait_for(post)

    async def _account(self, post: Post) -> None:
        usage, ending, share_s = await self._ended(post)
        seconds = max(0.0, time.time() - post.asked_at)
        if await self._until_heard(lambda: self._queue.take_down(_BOARD, post.id)):
            note = {"model": post.model, "status": status_of(ending), "job": post.id, "share_s": round(share_s, 6)}
            self._write(_fact(post, usage, seconds, note))
            self._on_share(post.key_id, share_s)

    async def _ended(self, post: Post) -> tuple[Usage, Exception | None, float]:
        """What was used, how it ended, and its part of the workers' time."""
        usage, ending = await self._until_heard(lambda: self._read(post))
        ends = [await self._until_heard(partial(self._end_of, name)) for name in post.request_ids]
        return usage, ending, sum(end.share_s for end in ends if end is not None)

    async def _read(self, post: Post) -> tuple[Usage, Exception | None]:
        answer, ending = self._answer_of(post.request_ids, post.n), None
        try:
            await answer.completions()
        except QueueLost:
            raise
        except Exception as e:
            ending = e
        finally:
            await answer.close()
        return answer.usage, ending

    async def _end_of(self, request_id: str) -> End | None:
        status = await self._queue.status(request_id)
        return status.end if status is not None else None

    async def _until_heard(self, ask: Callable[[], Any]) -> Any:
        while True:
            try:
                return await ask()
            except QueueLost:
                await asyncio.sleep(_AGAIN_S)


def _fact(post: Post, usage: Usage, seconds: float, note: dict[str, Any]) -> Fact:
    return Fact(
        kind="serve.request",
        seconds=round(seconds, 6),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        num_requests=1,
        who=post.key_id,
        note=note,
    )
