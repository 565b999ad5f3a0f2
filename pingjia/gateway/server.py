"""Listening: the port, the keys that must be there before a model is loaded, uvicorn, and a shutdown that ends answers.

Not here: what is served (`app.py`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pingjia.errors import UserError
from pingjia.gateway.auth import load_keys
from pingjia.gateway.errors import Failure
from pingjia.gateway.service import Service
from pingjia.gateway.settings import GatewaySettings

log = logging.getLogger("pingjia.gateway")

# nginx keeps an idle connection for 60 s. Whoever closes first must be the client: a request it sends into a
# connection that the server is just closing is lost.
_KEEP_ALIVE_S = 75
_BACKSTOP_S = 2.0  # for answers to be ended readably after the drain; then uvicorn cancels what is left

_NO_HTTP = json.dumps(
    Failure(400, "this is no HTTP/1.1 request", "invalid_request_error", "invalid_http").envelope()
).encode()
_NO_HTTP_HEADERS = [
    ("content-type", "application/json"),
    ("content-length", str(len(_NO_HTTP))),
    ("connection", "close"),
]
_CROWD = json.dumps(
    Failure(503, "too many connections are open; try again in a second", "server_error", "overloaded").envelope()
).encode()
_CROWDED = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    + f"content-length: {len(_CROWD)}\r\n\r\n".encode()
    + _CROWD
)


def preflight(settings: GatewaySettings) -> None:
    """Everything that can be known before a model is loaded: the keys and the port. Raises UserError."""
    load_keys(settings)
    check_port(settings.host, settings.port)


def check_port(host: str, port: int) -> None:
    """Return if `serve` could listen there now. Raises UserError saying why not."""
    _listen(host, port).close()


def serve(
    app: FastAPI,
    settings: GatewaySettings,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let answers in work finish for `settings.drain_s`, and return.

    `on_ready(url)` is called when requests are taken. `on_stop()` is called after the signal, in a thread; requests
    are taken until it returns. A second SIGINT does not wait. Raises UserError when the port cannot be had. The
    backend is not stopped: that is up to whoever started it.
    """
    sock = _listen(settings.host, settings.port)
    if settings.access_log:
        _show_access_log()
    _Server(app, settings, _url(settings.host, sock), on_ready, on_stop).run(sockets=[sock])


class _Server(uvicorn.Server):
    """uvicorn, but answers end readably when the time to finish is over, and a signal lets `serve` return."""

    def __init__(
        self,
        app: FastAPI,
        settings: GatewaySettings,
        url: str,
        on_ready: Callable[[str], None] | None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(settings.head_s, settings.max_connections),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.drain_s + _BACKSTOP_S) + 1,
            )
        )
        self._service: Service = app.state.service
        self._drain_s = settings.drain_s
        self._url = url
        self._on_ready = on_ready
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("listening on %s", self._url)
        if self._on_ready is not None:
            self._on_ready(self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_stop is not None:
            await asyncio.to_thread(self._on_stop)
        self._service.start_draining()
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._service.end_all)
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own sends itself the signal again afterwards, which would kill the process before the caller of
        # `serve` has stopped its engine.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(head_s: float, max_connections: int) -> type[asyncio.Protocol]:
    class Protocol(H11Protocol):
        """Closes a connection that takes longer than `head_s` for a request head: uvicorn would wait for ever.

        One connection more than `max_connections` is told so, without a look at what it asks.
        """

        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self.transport.write(_CROWDED)
                self.transport.close()
                return
            self.head_timer = self.loop.call_later(head_s, self.close_late)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch_head(begun=True)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # The next head may have begun to come already, behind the request that was just answered.
            self.watch_head(begun=bool(self.conn.trailing_data[0]))

        def watch_head(self, *, begun: bool) -> None:
            awaits_head = self.conn.their_state is h11.IDLE
            if self.head_timer is None and awaits_head and begun:
                self.head_timer = self.loop.call_later(head_s, self.close_late)
            elif self.head_timer is not None and not awaits_head:
                self.head_timer.cancel()
                self.head_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP gets the envelope too, where an answer is still possible."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                head = h11.Response(status_code=400, headers=_NO_HTTP_HEADERS, reason=b"Bad Request")
                events = (head, h11.Data(data=_NO_HTTP), h11.EndOfMessage())
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # the application was reading this body; it must not answer as well
                self.cycle.message_event.set()
            self.transport.close()

        def close_late(self) -> None:
            self.head_timer = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return Protocol


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as e:
        raise UserError(f"host {host} cannot be listened on: {e}; give an address of this machine") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as e:
        sock.close()
        raise UserError(_why_not(e, host, port)) from None
    return sock


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there or choose another port (--port {port + 1})"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs more rights than this process has; choose a port of 1024 or more"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all of them"
    return f"port {port} on {host} cannot be listened on: {error.strerror}"


def _url(host: str, sock: socket.socket) -> str:
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _show_access_log() -> None:
    logger = logging.getLogger("pingjia.access")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))  # the lines are JSON already: no prefix
        logger.setLevel(logging.INFO)
        logger.propagate = False
