"""One OpenAI-compatible server behind the gateway: whether it is well, what it serves, and asking it over HTTP.

aiohttp and not httpx: a request costs a third of the CPU time. Not here: what its bytes mean (`upstream_events.py`),
nor which server is asked and when another one is tried (`upstream.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from pingjia.errors import PingjiaError, UpstreamFailed
from pingjia.gateway.replicas import Replica
from pingjia.gateway.upstream_events import MAX_EVENT, AnswerReader, EventReader, refusal
from pingjia.gateway.upstream_settings import ServerSettings, UpstreamSettings
from pingjia.remote import is_loopback, parse_url, seconds_to_wait
from pingjia.types import Chunk, Request

log = logging.getLogger("pingjia.gateway")

_CHECK_WAIT_S = 1.5
_PROOF_S = 0.5  # what was heard this long ago still shows that it works: with both, a frozen one is seen within 3 s
_MODELS_AGAIN_S = 30.0
_MAX_COMPLAINT = 64_000
_SETTLE_S = 0.05  # until a connection that the server is just closing is seen to be closed
_KEEP_S = 3.0  # uvicorn closes an idle connection after 5 s: whoever closes first must be this side


class ServerLost(UpstreamFailed):
    """It could not be reached, fell silent, or broke off: a sign that it is not well.

    is_gone: nobody is there. is_stale: it closed a kept connection just when it was used again, which says nothing.
    """

    def __init__(self, message: str, *, is_gone: bool = False, is_stale: bool = False) -> None:
        super().__init__(message)
        self.is_gone = is_gone
        self.is_stale = is_stale


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a server lists it. `id` is its name here, `name` there."""

    id: str
    name: str
    root: str
    parent: str | None
    max_model_len: int
    identity: str
    """What the list says of it that stays the same."""


class Server:
    """One server. Lives on the event loop, where `start` comes first and `close` last. key: what it wants from us."""

    def __init__(self, settings: ServerSettings, common: UpstreamSettings, key: str | None) -> None:
        host = parse_url(settings.url).host
        self.settings = settings
        self.name = settings.url
        self.models: dict[str, ServedModel] = {}
        self.is_well = False
        self.num_outstanding = 0
        self.num_begun = 0
        self.num_failures = 0  # in a row, of a kind that says it is not well
        self.num_failed = 0
        self.why = "it was not asked yet"
        self.busy_until = 0.0
        self.heard_at = time.monotonic()
        self._common = common
        self._key = key
        self._is_near = is_loopback(host)
        self._http: aiohttp.ClientSession | None = None
        self._base = settings.url.rstrip("/")
        self._models_at = 0.0
        self._can_count = True

    async def start(self) -> None:
        """Open what connections need."""
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._common.connect_s),
            trust_env=not self._is_near,  # a proxy for the internet must not be asked for a server on this machine
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._http is not None, "start comes first"
        return self._http

    # ---- how a policy sees it

    @property
    def replica(self) -> Replica:
        return Replica(self.name, self.settings.weight, self.num_outstanding, self.num_begun)

    @property
    def has_room(self) -> bool:
        return self.num_outstanding < self.settings.max_concurrent

    def serves(self, model: str) -> bool:
        return self.is_well and model in self.models

    # ---- whether it is well

    async def check(self) -> None:
        """Ask how it is, unless it is just proving it; and from time to time, while it is idle, what it serves.

        A server may answer one request at a time and end an answer when another request comes (llama-cpp-python does):
        nothing that could wait for its model is asked while it works.
        """
        if self.is_well and self.num_outstanding and time.monotonic() - self.heard_at < _PROOF_S:
            return
        try:
            async with asyncio.timeout(_CHECK_WAIT_S):
                await self._ask_health()
                if not self.models or (not self.num_outstanding and self._are_models_old()):
                    await self._ask_models()
        except (UpstreamFailed, aiohttp.ClientError, OSError, TimeoutError) as e:
            self._is_unwell(str(e) or f"no answer to a check within {_CHECK_WAIT_S:g} s")
        else:
            self._is_well_again()

    def failed(self, error: UpstreamFailed) -> None:
        """Take note of an answer that broke."""
        self.num_failed += 1
        self.num_failures += isinstance(error, ServerLost)
        if self.num_failures >= self._common.max_failures or (isinstance(error, ServerLost) and error.is_gone):
            self._is_unwell(str(error))

    def _is_unwell(self, why: str) -> None:
        if self.is_well or why != self.why:
            log.warning("upstream %s: %s; it gets no requests until it answers a check", self.name, why)
        self.is_well, self.why = False, why

    def _is_well_again(self) -> None:
        if not self.is_well:
            log.info("upstream %s is ready: %s", self.name, ", ".join(self.models) or "it serves no model")
            self.num_failures = 0
        self.is_well = True

    def _are_models_old(self) -> bool:
        return time.monotonic() - self._models_at > _MODELS_AGAIN_S

    async def _ask_health(self) -> None:
        async with self._session.get(f"{self._base.removesuffix('/v1')}/health", headers=self._headers()) as response:
            if response.status >= 500:
                raise UpstreamFailed(f"its /health answers {response.status}")

    async def _ask_models(self) -> None:
        async with self._session.get(f"{self._base}/models", headers=self._headers()) as response:
            body = await response.content.read(MAX_EVENT)
            if response.status != 200:
                raise UpstreamFailed(str(refusal(response.status, body, None, self._key)))
        self.models = served_models(body, self.settings.models)
        self._models_at = time.monotonic()
        if not self.models:
            raise UpstreamFailed(f"{self._base}/models lists no model that is to be served")

    async def count(self, request: Request) -> int | None:
        """Tokens of the prompt as the server counts them; None where it does not (vLLM, SGLang and pingjia do)."""
        assert request.passed is not None
        assert request.adapter is not None
        if not self._can_count:
            return None
        said = json.loads(request.passed.body)
        asked = {name: said[name] for name in ("messages", "prompt", "tools") if name in said}
        url = f"{self._base.removesuffix('/v1')}/tokenize"
        body = {"model": self.models[request.adapter].name, **asked}
        try:
            async with (
                asyncio.timeout(_CHECK_WAIT_S),
                self._session.post(url, json=body, headers=self._headers()) as reply,
            ):
                told = json.loads(await reply.content.read(MAX_EVENT)) if reply.status == 200 else {}
                self._can_count = reply.status not in (404, 405, 422)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        count = told.get("count") if isinstance(told, dict) else None
        return count if isinstance(count, int) and count > 0 else None

    # ---- asking it

    async def ask(self, request: Request) -> AsyncIterator[Chunk]:
        """Its answer, piece by piece. Closing the iterator closes the connection, which tells it to stop.

        Raises what `upstream_events.refusal` makes of a status, or UpstreamFailed; ServerLost when it is not well.
        """
        assert request.passed is not None
        reader = AnswerReader(request.passed.num_prompt)
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._open(request, stack)
                async for chunk in self._read(response, reader):
                    yield chunk
            # llama-cpp-python ends a stream without a word where it would answer 400 otherwise.
            if reader.has_said_nothing:
                await asyncio.sleep(_SETTLE_S)
                async with contextlib.AsyncExitStack() as stack:
                    response = await self._open(request, stack, stream=False)
                    async for chunk in self._read(response, reader):
                        yield chunk
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as e:
            is_gone = isinstance(e, aiohttp.ClientConnectorError)
            raise ServerLost(f"it cannot be reached ({_say(e)})", is_gone=is_gone) from None
        except (aiohttp.ClientError, OSError) as e:
            is_stale = isinstance(e, aiohttp.ServerDisconnectedError | ConnectionResetError) and not reader.has_begun
            raise ServerLost(f"it broke off ({_say(e)})", is_stale=is_stale) from None
        self.num_failures = 0
        yield reader.end()

    async def _open(
        self, request: Request, stack: contextlib.AsyncExitStack, *, stream: bool = True
    ) -> aiohttp.ClientResponse:
        assert request.passed is not None
        url = f"{self._base}/{request.passed.path}"
        headers = {**self._headers(), "content-type": "application/json", "x-request-id": _trace_id(request)}
        if request.trace:
            headers["traceparent"], _, state = request.trace.partition(" ")
            headers |= {"tracestate": state} if state else {}
        async with self._first_token():
            response = await self._session.post(
                url, data=self._body(request, stream=stream), headers=headers, allow_redirects=False
            )
        stack.callback(response.close)
        self.heard_at = time.monotonic()
        if response.status != 200:
            async with self._first_token():
                raise await self._refusal(response)
        return response

    async def _read(self, response: aiohttp.ClientResponse, reader: AnswerReader) -> AsyncIterator[Chunk]:
        if not response.content_type.startswith("text/event-stream"):
            async with self._first_token():
                data = await _read_whole(response)
            if (chunk := reader.read_whole(data)) is not None:
                yield chunk
            return
        events = EventReader()
        while not reader.is_done:
            received = await self._receive(response, reader)
            if not received:
                return
            for data in events.feed(received):
                if (chunk := reader.read(data)) is not None:
                    yield chunk

    async def _receive(self, response: aiohttp.ClientResponse, reader: AnswerReader) -> bytes:
        """What came. Raises ServerLost after a silence that is too long; a comment is a sign of life."""
        limit_s = self._common.idle_s if reader.has_begun else self._common.first_token_s
        try:
            async with asyncio.timeout(limit_s):
                received = await response.content.readany()
        except TimeoutError:
            raise ServerLost(f"it said nothing for {limit_s:g} s") from None
        self.heard_at = time.monotonic()
        return received

    @contextlib.asynccontextmanager
    async def _first_token(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._common.first_token_s):
                yield
        except TimeoutError:
            raise ServerLost(f"it said nothing for {self._common.first_token_s:g} s") from None

    async def _refusal(self, response: aiohttp.ClientResponse) -> PingjiaError:
        body = await response.content.read(_MAX_COMPLAINT)
        wait_s = seconds_to_wait(response.headers.get("retry-after", ""))
        error = refusal(response.status, body, wait_s, self._key)
        if wait_s is not None:
            self.busy_until = time.monotonic() + wait_s
        return error

    def _body(self, request: Request, *, stream: bool) -> bytes:
        assert request.passed is not None
        assert request.adapter is not None
        said: dict[str, Any] = {"model": self.models[request.adapter].name, "stream": stream}
        if stream:
            said["stream_options"] = {"include_usage": True}
        if request.sampling.seed is not None:
            said["seed"] = request.sampling.seed
        # The rest is JSON text already; two objects become one where they meet.
        return f"{json.dumps(said)[:-1]}, {request.passed.body[1:]}".encode()

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key}"} if self._key else {}


async def _read_whole(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for part in response.content.iter_any():
        data += part
        if len(data) > MAX_EVENT:
            raise UpstreamFailed(f"its answer has more than {MAX_EVENT} bytes")
    return bytes(data)


def served_models(body: bytes, names: Mapping[str, str]) -> dict[str, ServedModel]:
    """The models of a /v1/models document by their names here. `names`: name here -> name there; empty: all.

    Raises UpstreamFailed for something else.
    """
    try:
        rows = json.loads(body)["data"]
        listed = {str(row["id"]): row for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = "does its URL end as its clients use it (/v1)?"
        raise UpstreamFailed(f"its /models is no list of models; {hint}") from None
    wanted = dict(names) or {name: name for name in listed}
    here = {there: name for name, there in wanted.items()}
    return {name: _model(name, listed[there], here) for name, there in wanted.items() if there in listed}


_CHANGING = ("created", "permission", "loaded", "status")


def _model(name: str, row: Mapping[str, Any], here: Mapping[str, str]) -> ServedModel:
    length, parent = row.get("max_model_len"), here.get(str(row.get("parent")))
    stays = {k: v for k, v in row.items() if k not in _CHANGING}
    return ServedModel(
        id=name,
        name=str(row["id"]),
        root=str(row.get("root") or row["id"]),
        parent=parent if parent != name else None,
        max_model_len=length if isinstance(length, int) and length > 0 else 0,
        identity=json.dumps(stays, sort_keys=True, ensure_ascii=True, default=str),
    )


def _trace_id(request: Request) -> str:
    """The hexadecimal part of the request's id as a UUID: llama-cpp-python refuses any other form with 400."""
    found = re.search("[0-9a-f]{32}", request.id)
    return str(uuid.UUID(found[0]) if found else uuid.uuid5(uuid.NAMESPACE_URL, request.id))


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__
