"""The one way of every answer: ready? -> a road -> the prompt's ids -> the backend or the queue -> the account of it.

Knows nothing of HTTP shapes (`chat.py`, `completions.py`, `demo.py`) nor of sockets (`reply.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.gateway.answer import Answer
from pingjia.gateway.ask import Ask, AskedPrompt, TokenIds, choose, requests_of, served, token_ids
from pingjia.gateway.errors import CLIENT_CLOSED, AnswerCancelled, NotReady, status_of
from pingjia.gateway.metrics import Metrics
from pingjia.gateway.roads import Roads, Turn
from pingjia.gateway.settings import GatewaySettings
from pingjia.ledger import Fact, Ledger
from pingjia.queue.job import Rank
from pingjia.types import ModelCard, as_dict

log = logging.getLogger("pingjia.gateway")

# A tokenizer does one or two million characters a second: below this it holds the event loop for some milliseconds.
_RENDER_INLINE_CHARS = 8_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `account` is filled with the answer's numbers when it ends; the access log shows them."""

    request_id: str
    key_id: str
    rank: Rank = "normal"
    account: dict[str, Any] = field(default_factory=dict)


class Service:
    """What the endpoints share. One per app; lives on the event loop."""

    def __init__(
        self,
        roads: Roads,
        tokenizer: Tokenizer,
        settings: GatewaySettings,
        *,
        ledger: Ledger | None,
        clock: Callable[[], float],
    ) -> None:
        self.roads = roads
        self.backend = roads.known
        self.admission = roads.admission
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = Metrics(roads.known.stats)
        self._ledger = ledger
        self.clock = clock
        self._answers: set[Answer] = set()
        self._draining = False
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    def cards(self) -> list[ModelCard]:
        """The models under the names clients use."""
        return served(self.backend.models(), self.settings)

    def card(self, name: str | None) -> ModelCard:
        """The model a request means. Raises ModelNotFound or RequestError."""
        return choose(self.cards(), name, self.settings)

    def is_ready(self) -> bool:
        """True when a new request would be taken on and could be answered."""
        return not self._draining and self.backend.is_ready()

    @asynccontextmanager
    async def answering(self, ask: Ask, caller: Caller) -> AsyncIterator[Answer]:
        """Take the request on; leaving the context ends the answer, however it is left, and accounts for it once.

        Raises NotReady, Overloaded, RequestError or PromptTooLong before anything was computed.
        """
        started, deadline = self.clock(), asyncio.get_running_loop().time() + self.settings.deadline_s
        if not self.is_ready():
            raise NotReady("the model cannot answer now (starting, stopping or stuck); GET /health/ready says when")
        road = self.roads.choose()
        async with self.roads.slots(road, ask.num_choices):
            requests = requests_of(
                ask, [await self._ids(prompt, ask.prompt_field) for prompt in ask.prompts], self.settings
            )
            left_s = deadline - asyncio.get_running_loop().time()
            async with self.roads.open(road, requests, Turn(caller.key_id, caller.rank, left_s)) as backend:
                answer = Answer(backend, requests, choices_per_prompt=ask.n, deadline=deadline, clock=self.clock)
                async with self._running(ask, answer, caller, started):
                    yield answer

    def start_draining(self) -> None:
        """Take on nothing new; what is in work goes on."""
        self._draining = True

    def end_all(self) -> None:
        """End every answer in work with an error its client can read."""
        for answer in self._answers:
            answer.fail(AnswerCancelled("the server is shutting down and could not finish this answer; ask again"))

    def close(self) -> None:
        """Let go of the render thread."""
        self._renderer.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _running(self, ask: Ask, answer: Answer, caller: Caller, started: float) -> AsyncIterator[None]:
        self._answers.add(answer)
        ending: BaseException | None = None
        try:
            yield
        except BaseException as e:
            ending = e
            raise
        finally:
            self._answers.discard(answer)
            try:
                await answer.close()
            finally:
                self._account(ask, caller, answer, ending, started)

    async def _ids(self, prompt: AskedPrompt, field: str) -> tuple[int, ...]:
        if _size(prompt) <= _RENDER_INLINE_CHARS:
            return token_ids(prompt, self.tokenizer, field)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._renderer, token_ids, prompt, self.tokenizer, field)

    def _account(self, ask: Ask, caller: Caller, answer: Answer, ending: BaseException | None, started: float) -> None:
        ended, status, usage = self.clock(), status_of(ending), answer.usage
        by_us = isinstance(ending, AnswerCancelled)
        reason = "cancelled" if status == CLIENT_CLOSED or by_us else "error"
        firsts = [t.first_at for t in answer.tallies if t.first_at is not None]
        note = {
            "model": ask.card.id,
            "finish_reason": ",".join(dict.fromkeys(t.finish_reason or reason for t in answer.tallies)),
            "ttft": round(min(firsts) - started, 6) if firsts else None,
        }
        self.admission.measure(ended - started)
        self.metrics.on_answer(ask.card.id, answer.tallies, reason, started, ended)
        caller.account.update(note, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        self._append(
            Fact(
                kind="serve.request",
                seconds=round(ended - started, 6),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                num_requests=1,
                who=caller.key_id,
                note={**note, "status": status},
            )
        )

    def _append(self, fact: Fact) -> None:
        if self._ledger is None:
            return
        try:
            self._ledger.append(fact)
        except OSError as e:
            # The answer is out; the numbers must not be lost with the disk.
            self.metrics.on_lost_fact()
            log.error("the ledger %s refused a fact (%s): %s", self._ledger.path, e, json.dumps(as_dict(fact)))


def _size(prompt: AskedPrompt) -> int:
    if isinstance(prompt, TokenIds):
        return 0
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.content) for message in prompt)
