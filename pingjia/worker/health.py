"""What a worker says of itself over HTTP: /health/live, /health/ready and /metrics, in a thread of its own.

It answers from the start of the process on, also while the model loads, and when the worker's event loop is stuck.
No keys and no contents. Not here: answers; they go through the queue.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pingjia.engine_metrics import PREFIX, EngineCollector
from pingjia.errors import UserError
from pingjia.queue.job import Claim, End
from pingjia.types import Backend, EngineStats

log = logging.getLogger("pingjia.worker")

STUCK_S = 10.0
"""A worker whose event loop has not turned for so long does not live."""
_WAIT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)


class Health:
    """What is known of this worker, from its loading to its end. Told by the worker, read by the thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._backend: Backend | None = None
        self._is_pulling = False
        self._turned_at: float | None = None
        self.registry.register(EngineCollector(self.stats, self.is_ready))
        self._waited = Histogram(
            PREFIX + "request_queue_time_seconds", "Submission to this worker's claim", ["model_name"],
            buckets=_WAIT_S, registry=self.registry,
        )  # fmt: skip
        self._ended = Counter(
            PREFIX + "worker_requests", "Requests this worker ended, by how", ["how"], registry=self.registry
        )

    # ---- told

    def loaded(self, backend: Backend) -> None:
        """The engine is there."""
        self._backend = backend

    def turned(self, *, is_pulling: bool) -> None:
        """The event loop goes round; is_pulling: new requests are taken and the queue can be reached."""
        self._is_pulling, self._turned_at = is_pulling, time.monotonic()

    def on_claim(self, claim: Claim) -> None:
        """A request was taken from the queue."""
        assert self._backend is not None
        models = self._backend.models()
        name = claim.job.request.adapter or (models[0].id if models else "")
        self._waited.labels(name).observe(max(0.0, claim.job.deadline_s - claim.left_s))

    def on_end(self, end: End) -> None:
        """A request has ended."""
        self._ended.labels(end.kind).inc()

    # ---- read

    def is_live(self) -> bool:
        """Whether the process does its work or still loads."""
        return self._turned_at is None or time.monotonic() - self._turned_at < STUCK_S

    def is_ready(self) -> bool:
        """Whether a token could come out now."""
        return self._backend is not None and self._is_pulling and self.is_live() and self._backend.is_ready()

    def stats(self) -> EngineStats:
        """The engine's; nothing while it loads."""
        return self._backend.stats() if self._backend is not None else EngineStats()


@contextmanager
def served(health: Health, host: str, port: int) -> Iterator[str]:
    """Answer at this address while the context lasts; its URL. Port 0 takes a free one. Raises UserError."""
    sock = _listen(host, port)
    server = _Server(uvicorn.Config(_app(health), ws="none", lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="pingjia-health", daemon=True)
    thread.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5.0)
        sock.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the worker's


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as e:
        raise UserError(f"health port {port} on {host}: {e}; choose another one (--health-port)") from None


def _app(health: Health) -> Starlette:
    def say(is_well: bool, word: str) -> Response:
        stats = health.stats()
        body = {"status": "ok" if is_well else word, "num_running": stats.num_running}
        body |= {"num_waiting": stats.num_waiting, "seconds_since_step": stats.seconds_since_step}
        return JSONResponse(body, status_code=200 if is_well else 503)

    async def live(request: Request) -> Response:
        return say(health.is_live(), "stuck")

    async def ready(request: Request) -> Response:
        return say(health.is_ready(), "not ready")

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(health.registry), media_type=CONTENT_TYPE_LATEST)

    paths = {"/health/live": live, "/health/ready": ready, "/health": ready, "/metrics": metrics}
    return Starlette(routes=[Route(path, endpoint) for path, endpoint in paths.items()])
