"""The application put together: the service, the endpoints, and in which order a request passes the middleware."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from pingjia import __version__
from pingjia.chat.tokenizer import Tokenizer
from pingjia.errors import UserError
from pingjia.gateway import (
    adapter_routes,
    batch_routes,
    cache_routes,
    errors,
    job_routes,
    routes,
    token_routes,
    upstream_routes,
)
from pingjia.gateway.access_log import AccessLog
from pingjia.gateway.auth import Auth, KeyRing, load_keys
from pingjia.gateway.batches import Batches
from pingjia.gateway.body_limit import BodyLimit
from pingjia.gateway.files import FileStore, state_dir
from pingjia.gateway.jobs import Jobs
from pingjia.gateway.no_tokenizer import NoTokenizer
from pingjia.gateway.openapi import complete
from pingjia.gateway.request_id import RequestId
from pingjia.gateway.response_headers import ResponseHeaders
from pingjia.gateway.roads import Roads, limits_of
from pingjia.gateway.service import Service
from pingjia.gateway.settings import GatewaySettings
from pingjia.gateway.traces import Traces
from pingjia.ledger import Ledger
from pingjia.queue.opening import open_queue
from pingjia.trace import Tracer, open_tracer
from pingjia.types import Backend

_LIMITS = ("requests", "tokens")
_FORM_BYTES = 64_000  # what a form adds to the file in it
_LIMIT_HEADERS = [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in _LIMITS]
_EXPOSED = ["x-request-id", "retry-after", "x-cache", "age", "x-language", *_LIMIT_HEADERS]


def create_app(
    backend: Backend | None,
    tokenizer: Tokenizer | None,
    settings: GatewaySettings,
    *,
    seats: int | None = None,
    ledger: Ledger | None = None,
    spent: Callable[[str], float] | None = None,
    adapters: adapter_routes.AdapterHost | None = None,
    clock: Callable[[], float] = time.monotonic,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The HTTP API over `backend`, which is started and stopped by whoever made it; None: workers behind the queue.

    `tokenizer` is None where other servers answer, and only there.
    `seats`: answers the backend computes at once, `max_concurrent` when not said; so many are claimed from the queue.
    `spent`: id of a key -> yuan it has spent this month, without which no key may have a budget. `adapters`: what loads
    and unloads adapters while the app runs; None where that is not in this process.
    `clock` (seconds) is what durations are measured with. `tracer`: that of the settings or OTEL_* when None.
    Raises UserError for settings that cannot be obeyed: keys that are required and absent, a default model that is not
    served.
    """
    keys = load_keys(settings)
    if spent is None:
        _refuse_budgets(keys)
    queue = open_queue(settings.redis_url, limits_of(settings))
    tracer = open_tracer("pingjia-gateway", settings.traces_url, os.environ) if tracer is None else tracer
    roads = Roads(backend, queue, settings, seats=seats or settings.max_concurrent, clock=clock, tracer=tracer)
    service = Service(roads, tokenizer or NoTokenizer(), settings, ledger=ledger, clock=clock, spent=spent)
    if backend is not None and service.upstream is None:
        _check_default(service)
    app = FastAPI(
        title="pingjia",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=_middleware(service, keys),
    )
    app.state.service = service
    app.state.adapters = adapters
    app.state.jobs = Jobs(service)
    root = state_dir(settings)
    app.state.files = FileStore(root, settings.max_file_bytes)
    app.state.batches = Batches(service, app.state.files, root)
    errors.install(app)
    app.include_router(routes.health_router)
    # Checks nothing (`Auth` does, before the body is read), but puts the scheme into the OpenAPI document.
    locks = [] if keys.is_open else [Depends(HTTPBearer(auto_error=False))]
    chats = routes.chat_router if service.upstream is None else upstream_routes.router
    app.include_router(chats, dependencies=locks)
    for part in (routes, token_routes, adapter_routes, cache_routes, job_routes, batch_routes):
        app.include_router(part.router, dependencies=locks)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _check_default(service: Service) -> None:
    name, served = service.settings.default_model, [card.id for card in service.cards()]
    if name is not None and name not in served:
        raise UserError(f"serve.default_model is {name!r}, which is not served; choose one of {', '.join(served)}")


def _refuse_budgets(keys: KeyRing) -> None:
    names = keys.named_with_budget()
    if names:
        raise UserError(f"key {names[0]!r} has a monthly budget, which a ledger must count: serve with --ledger FILE")


def _middleware(service: Service, keys: KeyRing) -> list[Middleware]:
    """Outermost first. What costs nothing refuses before what costs something: the key before the body."""
    settings = service.settings
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )
    return [
        Middleware(RequestId),
        Middleware(Traces, tracer=service.tracer),
        Middleware(ResponseHeaders),
        Middleware(AccessLog, clock=service.clock, on_status=service.metrics.on_status),
        Middleware(errors.LastResort),
        *([cors] if settings.cors_origins else []),
        Middleware(Auth, keys=keys),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_s=settings.body_s, streamed=_streamed(settings)),
    ]


def _streamed(settings: GatewaySettings) -> dict[str, int]:
    return {"/v1/files": settings.max_file_bytes + _FORM_BYTES}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    if service.upstream is not None:
        await service.upstream.start()
    await service.roads.start()
    app.state.jobs.accounts.start()
    await app.state.batches.start()
    yield
    await app.state.batches.close()
    await app.state.jobs.close()
    await service.roads.stop()
    if service.upstream is not None:
        await service.upstream.stop()
    await service.guard.close()
    await service.cache.close()
    service.close()
    await asyncio.to_thread(service.tracer.close)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        pairs: Any = [(model, "serialization") for model in routes.STREAMED]
        _, definitions = models_json_schema(pairs, ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] = {**definitions["$defs"], **schema["components"]["schemas"]}
        app.openapi_schema = complete(schema)
    return app.openapi_schema
