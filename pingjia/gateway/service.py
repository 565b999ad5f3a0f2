"""The one way of every answer: ready? -> a road -> the prompt's ids -> the backend or the queue -> the account of it.

Knows nothing of HTTP shapes (`chat.py`, `completions.py`, `demo.py`) nor of sockets (`reply.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pingjia.chat.tokenizer import Tokenizer
from pingjia.gateway.answer import Answer, Source
from pingjia.gateway.ask import Ask, AskedPrompt, TokenIds, choose, requests_of, served, token_ids
from pingjia.gateway.bodies import ChatBody
from pingjia.gateway.cache import CachedAnswers, Question, ResultCache, Road, Wish
from pingjia.gateway.errors import CLIENT_CLOSED, AnswerCancelled, NotReady, status_of
from pingjia.gateway.guard import Guard, Spent, Visit
from pingjia.gateway.in_work import Places
from pingjia.gateway.keys import NOBODY, Key
from pingjia.gateway.language import LanguageFront, Refusal
from pingjia.gateway.queue_metrics import QueueCollector
from pingjia.gateway.rate_limits import RateLimits
from pingjia.gateway.roads import Road as RoadName
from pingjia.gateway.roads import Roads, Turn
from pingjia.gateway.settings import GatewaySettings
from pingjia.gateway.upstream import Upstream
from pingjia.gateway.upstream_body import PassedChatBody
from pingjia.gateway.upstream_metrics import UpstreamCollector
from pingjia.ledger import Fact, Ledger
from pingjia.queue.job import Rank
from pingjia.queue.shares import Shares
from pingjia.trace import NO_SPAN, Span
from pingjia.types import ModelCard, Request, as_dict

log = logging.getLogger("pingjia.gateway")
_T = TypeVar("_T")

# A tokenizer does one or two million characters a second: below this it holds the event loop for some milliseconds.
_RENDER_INLINE_CHARS = 8_000
_LEASE_MORE_S = 10.0  # a place of a key is held beyond the deadline of its answer, for what ending it takes


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `account` is filled with the answer's numbers when it ends; the access log shows them.

    `headers` are added to the response. cache_control: the request's own header.
    """

    request_id: str
    key: Key = NOBODY
    rank: Rank = "normal"
    account: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cache_control: str = ""
    must_queue: bool = False
    deadline_s: float | None = None  # instead of the settings'
    span: Span = NO_SPAN

    @property
    def key_id(self) -> str:
        return self.key.id


@dataclass(frozen=True, slots=True)
class Work:
    """One request in work. `started` is the clock's."""

    ask: Ask
    caller: Caller
    source: Source
    answer: Answer
    visit: Visit
    started: float
    road: str

    @property
    def is_free(self) -> bool:
        """Whether none of it is computed for this caller: it is kept, computed for another, or a rule's own words."""
        cached = isinstance(self.source, CachedAnswers) and self.source.are_shared
        return cached or self.ask.refusal is not None

    def note(self, reason: str) -> dict[str, Any]:
        """For log and ledger. reason: how choices ended that do not say it themselves."""
        firsts = [t.first_at for t in self.answer.tallies if t.first_at is not None]
        note = {
            "model": self.ask.card.id,
            "finish_reason": ",".join(dict.fromkeys(t.finish_reason or reason for t in self.answer.tallies)),
            "ttft": round(min(firsts) - self.started, 6) if firsts else None,
        }
        if self.ask.refusal is not None:
            return {**note, "refused": "language"}
        return {**note, "cache": "hit"} if self.is_free else note


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
        spent: Spent | None = None,
    ) -> None:
        self.roads = roads
        self.backend = roads.known
        self.upstream = self.backend if isinstance(self.backend, Upstream) else None
        self.admission = roads.admission
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = roads.metrics
        self.tracer = roads.tracer
        self.metrics.registry.register(QueueCollector(roads))
        if self.upstream is not None:
            self.metrics.registry.register(UpstreamCollector(self.upstream))
        self._ledger = ledger
        self.clock = clock
        rates = RateLimits(settings.redis_url, local_share=settings.local_limit_share, clock=clock)
        places = Places(settings.redis_url, lease_s=settings.deadline_s + _LEASE_MORE_S)
        self.guard = Guard(rates, places, spent, clock)
        self.cache = ResultCache(settings, self.cards, self.metrics.registry)
        self.front = LanguageFront(settings, self.card, self.metrics.registry)
        self._shares = Shares(clock)
        self._answers: set[Answer] = set()
        self._draining = False
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    @property
    def chat_body(self) -> type[ChatBody] | type[PassedChatBody]:
        """How the body of a chat request is read."""
        return ChatBody if self.upstream is None else PassedChatBody

    def cards(self) -> list[ModelCard]:
        """The models under the names clients use."""
        return served(self.backend.models(), self.settings)

    def card(self, name: str | None) -> ModelCard:
        """The model a request means. Raises ModelNotFound, RequestError, or NotReady while nothing is served."""
        cards = self.cards()
        if not cards:
            raise NotReady("no worker has said yet what it serves; GET /health/ready says when")
        return choose(cards, name, self.settings)

    def is_ready(self) -> bool:
        """True when a new request would be taken on and could be answered."""
        return not self._draining and self.backend.is_ready()

    @asynccontextmanager
    async def answering(self, ask: Ask, caller: Caller) -> AsyncIterator[Answer]:
        """Take the request on; leaving the context ends the answer, however it is left, and accounts for it once.

        Raises NotReady, Overloaded, RequestError or PromptTooLong before anything was computed.
        """
        started = self.clock()
        deadline = asyncio.get_running_loop().time() + (caller.deadline_s or self.settings.deadline_s)
        if not self.is_ready():
            raise NotReady("the model cannot answer now (starting, stopping or stuck); GET /health/ready says when")
        async with AsyncExitStack() as stack:
            with caller.span.child("gate"):
                visit, road, requests = await stack.enter_async_context(self._let_in(ask, caller))
            left_s = deadline - asyncio.get_running_loop().time()
            way = partial(self.roads.open, road, turn=Turn(caller.key_id, caller.rank, left_s, caller.span))
            source = await stack.enter_async_context(self._source(ask, requests, caller, way))
            answer = Answer(source, requests, choices_per_prompt=ask.n, deadline=deadline, clock=self.clock)
            work = Work(ask, caller, source, answer, visit, started, road)
            await stack.enter_async_context(self._running(work))
            yield answer

    @asynccontextmanager
    async def _let_in(self, ask: Ask, caller: Caller) -> AsyncIterator[tuple[Visit, RoadName, tuple[Request, ...]]]:
        """What a key may do and what fits; then the road and what is asked on it."""
        async with self.guard.visit(caller.key, ask.card.id, ask.num_choices, caller.headers) as visit:
            road = self.roads.choose(must_queue=caller.must_queue)
            async with self.roads.slots(road, ask.num_choices):
                requests = await self.requests(ask)
                await self.guard.reserve(visit, requests)
                yield visit, road, requests

    async def requests(self, ask: Ask) -> tuple[Request, ...]:
        """What the backend is asked, one request per choice. Raises RequestError or PromptTooLong."""
        if self.upstream is not None:
            return await self.upstream.requests_of(ask, self.settings)
        return requests_of(ask, await self.prompt_ids(ask), self.settings)

    async def prompt_ids(self, ask: Ask) -> list[tuple[int, ...]]:
        """The token ids of all prompts. Raises RequestError."""
        return [await self._ids(prompt, ask) for prompt in ask.prompts]

    def takes_on(self) -> bool:
        """False once the server is stopping."""
        return not self._draining

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
    async def _source(self, ask: Ask, requests: Sequence[Request], caller: Caller, road: Road) -> AsyncIterator[Source]:
        """Where the answers come from: a rule, the cache, or the road."""
        if ask.refusal is not None:
            yield Refusal(ask.refusal, self.tokenizer if self.upstream is None else None)
            return
        question = Question(
            owner=caller.key.owner,
            card=ask.card,
            cards=self.cards(),
            wish=Wish.of(caller.cache_control),
            headers=caller.headers,
            was_seeded=ask.sampling.seed is not None,
            ask=ask,
        )
        async with self.cache.open(requests, question, road) as source:
            yield source

    @asynccontextmanager
    async def _running(self, work: Work) -> AsyncIterator[None]:
        self._answers.add(work.answer)
        num = 0 if work.is_free else work.ask.num_choices
        entered = self._shares.enter(num)
        ending: BaseException | None = None
        try:
            yield
        except BaseException as e:
            ending = e
            raise
        finally:
            self._answers.discard(work.answer)
            try:
                await work.answer.close()
            finally:
                self._account(work, ending, self._shares.leave(num, entered))

    async def _ids(self, prompt: AskedPrompt, ask: Ask) -> tuple[int, ...]:
        tools = ask.toolbox.listed
        size = _size(prompt) + sum(map(len, tools))
        return await self.in_renderer(size, lambda: token_ids(prompt, self.tokenizer, ask.prompt_field, tools))

    async def in_renderer(self, num_chars: int, work: Callable[[], _T]) -> _T:
        """What a tokenizer does with so much text: here, or in a thread of its own where it would hold up others."""
        if num_chars <= _RENDER_INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work)

    def _account(self, work: Work, ending: BaseException | None, share_s: float) -> None:
        ended, status, usage, caller = self.clock(), status_of(ending), work.answer.usage, work.caller
        reason = "cancelled" if status == CLIENT_CLOSED or isinstance(ending, AnswerCancelled) else "error"
        note = work.note(reason)
        work.visit.num_used = 0 if work.is_free else usage.prompt_tokens + usage.completion_tokens
        if not work.is_free:
            self.admission.measure(ended - work.started)
        self.metrics.on_answer(work.ask.card.id, work.answer.tallies, reason, work.started, ended)
        self.metrics.on_road("none" if work.is_free else work.road, ended - work.started)
        self.metrics.on_share(caller.key_id, share_s)
        caller.account.update(note, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        self.append(
            Fact(
                kind="serve.request",
                seconds=round(ended - work.started, 6),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                num_requests=1,
                who=caller.key_id,
                note={**note, "status": status, "share_s": round(share_s, 6)},
            )
        )

    def append(self, fact: Fact) -> None:
        """Write a fact into the ledger, or into the log when that refuses."""
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
    return sum(len(message.text) for message in prompt)
