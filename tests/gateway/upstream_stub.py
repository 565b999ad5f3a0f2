"""A server of OpenAI's API that does what a test tells it, faults included. In a thread, on a free port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Act:
    """What the server does with a request. `*_after` counts pieces; None: never."""

    pieces: tuple[str, ...] = ("你好", ", ", "wor", "ld")
    first_s: float = 0.0
    piece_s: float = 0.0
    status: int = 200
    error: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 11, "completion_tokens": 4})
    finish: str | None = "stop"
    deltas: tuple[dict[str, Any], ...] | None = None  # instead of pieces
    cut_after: int | None = None
    error_after: int | None = None
    garbage_after: int | None = None
    silent_after: int | None = None
    endless: bool = False
    whole: bytes | None = None  # one JSON document instead of events
    raw: bytes | None = None  # these bytes as the event stream
    hang_head: bool = False


class Stub:
    """`act` is a script or a function of the body. `seen`: bodies asked. `num_left`: clients that went away."""

    def __init__(self, models: list[dict[str, Any]] | None = None) -> None:
        self.act: Any = Act()
        self.models = models or [{"id": "big", "object": "model", "max_model_len": 4096, "owned_by": "stub"}]
        self.health = 200
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_left = 0
        self.running = 0
        self.max_running = 0
        self.pieces_sent = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def go_down(self) -> None:
        """Close the port and every connection."""
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    def come_up(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(self.port), self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen(0))
        self._up.set()
        self._loop.run_forever()
        assert self._runner is not None
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _listen(self, port: int) -> None:
        app = web.Application(client_max_size=10_000_000)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        return web.json_response({"object": "list", "data": [{**m, "created": int(time.time())} for m in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("prompt") or "".join(m["content"] for m in body["messages"])
        return web.json_response({"count": len(text) // 3, "max_model_len": 4096, "tokens": []})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        act: Act = self.act(body) if callable(self.act) else self.act
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            return await self._play(request, act, is_chat=request.path.endswith("chat/completions"))
        except (asyncio.CancelledError, ConnectionError):
            self.num_left += 1
            raise
        finally:
            self.running -= 1

    async def _play(self, request: web.Request, act: Act, *, is_chat: bool) -> web.StreamResponse:
        while act.hang_head:
            await asyncio.sleep(0.02)
        if act.status != 200:
            text = act.error if isinstance(act.error, str) else json.dumps(act.error)
            return web.Response(status=act.status, text=text, headers=act.headers)
        if act.whole is not None:
            return web.Response(body=act.whole, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if act.raw is not None:
            await response.write(act.raw)
            return response
        await asyncio.sleep(act.first_s)
        await self._events(request, response, act, is_chat)
        return response

    async def _events(self, request: web.Request, response: web.StreamResponse, act: Act, is_chat: bool) -> None:
        async def send(choice: dict[str, Any] | None, **more: Any) -> None:
            document = {"id": "theirs", "choices": [choice] if choice else [], "model": "theirs", **more}
            await response.write(b"data: " + json.dumps(document).encode() + b"\r\n\r\n")

        if is_chat:
            await send({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        texts = [{"content": p} if is_chat else {"text": p} for p in act.pieces]
        i = 0
        while act.endless or i < len(act.deltas or texts):
            said = (act.deltas or texts)[i % len(act.deltas or texts)]
            if i == act.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return
            if i == act.error_after:
                await response.write(b'data: {"error": {"message": "cuda says no", "code": 500}}\n\n')
                return
            if i == act.garbage_after:
                await response.write(b"data: {nonsense\n\n")
            while i == act.silent_after:
                await asyncio.sleep(0.02)
            choice = {"delta": said} if is_chat and "delta" not in said else dict(said)
            await send({"index": 0, "finish_reason": None, **choice})
            self.pieces_sent += 1
            i += 1
            await asyncio.sleep(act.piece_s)
        await send({"index": 0, "finish_reason": act.finish, **({"delta": {}} if is_chat else {"text": ""})})
        if act.usage is not None:
            await send(None, usage=act.usage)
        await response.write(b"data: [DONE]\n\n")
