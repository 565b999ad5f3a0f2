"""/v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's form: adapters that come and go while requests run.

Not here: what loading does (`pingjia.engine.served`). Where keys are required it takes an admin's: a path on this
machine is read, and every key's answers may change.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Literal, Protocol

from fastapi import APIRouter, Request
from pydantic import Field

from pingjia.errors import ModelError, RequestError
from pingjia.gateway.bodies import Body
from pingjia.gateway.errors import DeadlineExceeded, Forbidden
from pingjia.gateway.responses import ModelOut, Out
from pingjia.gateway.routes import JSON_ONLY, errors_of, model_out, service_of
from pingjia.gateway.service import Service

router = APIRouter()


class AdapterHost(Protocol):
    """What serves adapters in this process."""

    def load_adapter(self, name: str, path: str) -> Future[None]:
        """Serve the adapter at `path` as `name`. The future raises ModelError where that is not possible."""
        ...

    def unload_adapter(self, name: str) -> Future[None]:
        """Stop serving it; what runs ends with it. The future raises ModelNotFound, or ModelError for the base."""
        ...


class LoadBody(Body):
    lora_name: str = Field(min_length=1, max_length=200, pattern=r"^\S+$", description="the `model` of requests")
    lora_path: str = Field(min_length=1, max_length=4096, description="a PEFT directory on the server's machine")


class UnloadBody(Body):
    lora_name: str = Field(min_length=1, max_length=200)


class Unloaded(Out):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


_ERRORS = errors_of(400, 401, 403, 404, 408, 413, 415, 500, 504)


@router.post("/v1/load_lora_adapter", dependencies=JSON_ONLY, responses=_ERRORS)
async def load_lora_adapter(body: LoadBody, request: Request) -> ModelOut:
    """Serve an adapter. Equal files change nothing; others replace what was served under the name."""
    service, host = service_of(request), _host(request)
    _refuse_base(body.lora_name, service)
    if "\0" in body.lora_path:
        raise RequestError("lora_path: no path holds a zero byte", param="lora_path", code="invalid_value")
    await _done(host.load_adapter(body.lora_name, body.lora_path), service, "lora_path")
    return model_out(service.card(body.lora_name))


@router.post("/v1/unload_lora_adapter", dependencies=JSON_ONLY, responses=_ERRORS)
async def unload_lora_adapter(body: UnloadBody, request: Request) -> Unloaded:
    """Stop serving an adapter. Requests that are in work end with it."""
    service, host = service_of(request), _host(request)
    _refuse_base(body.lora_name, service)
    await _done(host.unload_adapter(body.lora_name), service, "lora_name")
    return Unloaded(id=body.lora_name, object="model", deleted=True)


def _host(request: Request) -> AdapterHost:
    key = request.scope["state"].get("key")
    if key is not None and not key.admin:
        raise Forbidden("adapters are loaded and unloaded with an admin key: pingjia keys create NAME --admin")
    host: AdapterHost | None = request.app.state.adapters
    if host is None:
        raise RequestError(
            "the models run in other processes; give adapters to those: pingjia worker MODEL --adapter NAME=DIR",
            code="unsupported_here",
        )
    return host


def _refuse_base(name: str, service: Service) -> None:
    if any(card.id == name and card.parent is None for card in service.cards()):
        raise RequestError(f"lora_name: {name!r} is the base model", param="lora_name", code="invalid_value")


async def _done(future: Future[None], service: Service, field: str) -> None:
    try:
        async with asyncio.timeout(service.settings.deadline_s):
            await asyncio.wrap_future(future)
    except TimeoutError:
        raise DeadlineExceeded("the engine did not come to it in time; GET /v1/models says what is served") from None
    except ModelError as e:
        raise RequestError(str(e), param=field, code="invalid_value") from None
