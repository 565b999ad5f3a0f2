"""Servers in the place of an engine: `pingjia.types.Backend` over OpenAI-compatible servers (vLLM, SGLang, llama.cpp).

Here: who is asked, waiting for room, another server when one fails before the first piece of its answer. Not here: HTTP
(`upstream_server.py`), the choice among equals (`replicas.py`), what of a request they are told (`upstream_body.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import cast

from pingjia.errors import PingjiaError, UpstreamBusy, UpstreamFailed, UserError
from pingjia.gateway.ask import Ask
from pingjia.gateway.replicas import LeastOutstanding, Policy
from pingjia.gateway.settings import GatewaySettings
from pingjia.gateway.upstream_affinity import TextAffinity
from pingjia.gateway.upstream_body import requests_of
from pingjia.gateway.upstream_server import ServedModel, Server, ServerLost
from pingjia.gateway.upstream_settings import UpstreamSettings
from pingjia.gateway.upstream_tokens import Correction
from pingjia.types import Chunk, EngineStats, ModelCard, Request, Usage

log = logging.getLogger("pingjia.gateway")

_MARGIN = 1.5  # an estimate may be that far off


class Upstream:
    """A backend whose answers come from other servers. `start` on the event loop before it is used, `stop` at the end.

    Raises UserError for settings that cannot be obeyed.
    """

    def __init__(
        self, settings: UpstreamSettings, policy: Policy | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.settings = settings
        self._corrections: dict[str, Correction] = {}
        self._policy: Policy = policy or (TextAffinity() if settings.affinity else LeastOutstanding())
        self._servers = [Server(one, settings, _key(one.api_key_env, environ)) for one in settings.servers]
        _refuse_twins(self._servers)
        self._freed = asyncio.Event()
        self._checks: list[asyncio.Task[None]] = []
        self._cards: dict[str, ModelCard] = {}
        self._stats = _Counts()

    # ---- life

    async def start(self) -> None:
        """Ask every server once what it serves, and from then on how it is."""
        for server in self._servers:
            await server.start()
        await asyncio.gather(*(server.check() for server in self._servers))
        self._checks = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def stop(self) -> None:
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        for server in self._servers:
            await server.close()

    async def _watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(self.settings.check_s)
            try:
                await server.check()
            except Exception:
                log.exception("upstream %s could not be checked", server.name)
            self._tell()  # whoever waits for room may have a server now, or none any more

    @property
    def servers(self) -> list[Server]:
        return self._servers

    @property
    def seats(self) -> int:
        """Answers all servers together work on at once."""
        return sum(server.settings.max_concurrent for server in self._servers)

    # ---- Backend

    def models(self) -> list[ModelCard]:
        """What the servers that are well serve; what they served last while none is."""
        listed: dict[str, list[ServedModel]] = {}
        for server in self._servers:
            for model in server.models.values() if server.is_well else ():
                listed.setdefault(model.id, []).append(model)
        if listed:
            self._cards = {name: self._card(models, listed) for name, models in listed.items()}
        return list(self._cards.values())

    def stats(self) -> EngineStats:
        """Running and waiting here; tokens as the servers counted them."""
        return EngineStats(
            num_running=sum(server.num_outstanding for server in self._servers),
            num_waiting=self._stats.num_waiting,
            prompt_tokens_total=self._stats.prompt_tokens,
            cached_tokens_total=self._stats.cached_tokens,
            generation_tokens_total=self._stats.generation_tokens,
            seconds_since_step=min((time.monotonic() - s.heard_at for s in self._servers), default=0.0),
        )

    def is_ready(self) -> bool:
        return any(server.is_well for server in self._servers)

    async def requests_of(self, ask: Ask, settings: GatewaySettings) -> tuple[Request, ...]:
        """What servers are asked for this, one request per choice.

        Where an estimate may be too far off, as the answer gets what the prompt leaves, a server is asked to count.
        """
        correct = self._correction(ask.card.id).apply
        requests = requests_of(ask, settings, correct)
        prompt = max(request.num_prompt for request in requests)
        fits = not ask.card.max_model_len or _MARGIN * prompt + settings.default_max_tokens <= ask.card.max_model_len
        if fits or len(ask.prompts) > 1 or ask.max_tokens is not None or ask.max_total is not None:
            return requests
        server = next((s for s in self._servers if s.serves(ask.card.id)), None)
        count = await server.count(requests[0]) if server is not None else None
        return requests if count is None else requests_of(ask, settings, lambda _: count)

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """The answer of one server. Another is asked when it fails before its first piece, and never later.

        Raises RequestError, UpstreamBusy or UpstreamFailed.
        """
        tries = _Tries()
        for _ in range(self.settings.retries + 1):
            server = await self._enter(request, tries)
            if server is None:
                break
            begun = False
            try:
                async with aclosing(cast("AsyncGenerator[Chunk, None]", server.ask(request))) as chunks:
                    async for chunk in chunks:
                        begun = True
                        self._count(request, chunk)
                        yield chunk
                return
            except (UpstreamFailed, UpstreamBusy) as e:
                self._note(server, e, request)
                tries.add(server, e)
                if begun:
                    raise tries.failures[-1] from None
            finally:
                self._leave(server)
        raise tries.verdict()

    # ---- inside

    async def _enter(self, request: Request, tries: _Tries) -> Server | None:
        """A server with room, and a place there; None when there is nobody (else) to ask."""
        assert request.adapter is not None
        self._stats.num_waiting += 1
        try:
            while open_ := [s for s in self._servers if s.name not in tries.names and s.serves(request.adapter)]:
                now = time.monotonic()
                willing = [s for s in open_ if s.busy_until <= now] or open_
                if with_room := {s.name: s for s in willing if s.has_room}:
                    chosen = self._policy.choose([s.replica for s in with_room.values()], request)
                    server = with_room[chosen.name]
                    server.num_outstanding += 1
                    server.num_begun += 1
                    return server
                await self._freed.wait()
            return None
        finally:
            self._stats.num_waiting -= 1

    def _leave(self, server: Server) -> None:
        server.num_outstanding -= 1
        self._tell()

    def _tell(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    def _note(self, server: Server, error: UpstreamFailed | UpstreamBusy, request: Request) -> None:
        log.warning("request %s: upstream %s: %s", request.id, server.name, error)
        if isinstance(error, UpstreamFailed):
            server.failed(error)

    def _count(self, request: Request, chunk: Chunk) -> None:
        if chunk.usage is None or request.passed is None:
            return
        self._stats.add(chunk.usage)
        correction = self._correction(request.adapter or "")
        correction.learn(round(request.passed.num_prompt / correction.factor), chunk.usage.prompt_tokens)

    def _correction(self, model: str) -> Correction:
        return self._corrections.setdefault(model, Correction())

    def _card(self, models: list[ServedModel], listed: Mapping[str, list[ServedModel]]) -> ModelCard:
        """One card for a model that several servers may serve; without a digest where they tell different things."""
        first, before = models[0], self._cards.get(models[0].id)
        lengths = [model.max_model_len for model in models if model.max_model_len]
        return ModelCard(
            id=first.id,
            root=first.root,
            parent=first.parent if first.parent in listed else None,
            max_model_len=min(lengths, default=0),
            created=before.created if before is not None else int(time.time()),
            digest=self._digest(first) if len({model.identity for model in models}) == 1 else "",
        )

    def _digest(self, model: ServedModel) -> str:
        """Who answers, as far as a gateway can know: the servers, the model's name there, all that is said of it."""
        urls = sorted(server.name for server in self._servers)
        told = json.dumps([urls, model.name, model.identity, self.settings.revision])
        return hashlib.sha256(told.encode()).hexdigest()


class _Tries:
    """Servers that a request was sent to in vain, and what came of it."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.failures: list[PingjiaError] = []
        self._had_stale = False

    def add(self, server: Server, error: UpstreamFailed | UpstreamBusy) -> None:
        """A kept connection that broke is tried again once, with a new one."""
        if isinstance(error, ServerLost) and error.is_stale and not self._had_stale:
            self._had_stale = True
        else:
            self.names.add(server.name)
        is_busy = isinstance(error, UpstreamBusy)
        self.failures.append(error if is_busy else UpstreamFailed(f"the server behind this gateway failed: {error}"))

    def verdict(self) -> PingjiaError:
        """What to say after all who could be asked have failed: when to come back, if any of them is only busy."""
        busy = [failure for failure in self.failures if isinstance(failure, UpstreamBusy)]
        if busy:
            return min(busy, key=lambda failure: failure.retry_after_s)
        if self.failures:
            return self.failures[-1]
        return UpstreamBusy("no server that has this model is well now; GET /health/ready says when", retry_after_s=1.0)


class _Counts:
    """Numbers for `stats`."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0

    def add(self, usage: Usage) -> None:
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generation_tokens += usage.completion_tokens


def _key(name: str | None, environ: Mapping[str, str]) -> str | None:
    if name is None:
        return None
    key = environ.get(name, "")
    if not key:
        raise UserError(f"serve.upstream: api_key_env is {name}, and there is no such environment variable; set it")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"serve.upstream: the key in {name} holds characters that no HTTP header can carry")
    return key


def _refuse_twins(servers: list[Server]) -> None:
    names = [server.name for server in servers]
    twin = next((name for name in names if names.count(name) > 1), None)
    if twin is not None:
        raise UserError(f"serve.upstream: {twin} is given twice; give it once, with a larger weight or max_concurrent")
