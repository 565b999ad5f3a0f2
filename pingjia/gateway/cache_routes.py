"""DELETE /v1/cache: a tenant forgets its cached answers; an administrator's key, those of others."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from pingjia.gateway.errors import Forbidden
from pingjia.gateway.keys import NOBODY, Key
from pingjia.gateway.responses import Out
from pingjia.gateway.routes import errors_of
from pingjia.gateway.service import Service

router = APIRouter()


class Purged(Out):
    object: Literal["cache.purged"]
    num_answers: int


@router.delete("/v1/cache", responses=errors_of(400, 401, 403, 500))
async def purge_cache(
    request: Request,
    key: Annotated[str | None, Query(description="id of the key whose answers go; its own without")] = None,
    tenant: Annotated[str | None, Query(description="or the tenant whose answers go")] = None,
    everyone: Annotated[Literal["true"] | None, Query(alias="all", description="or all of them")] = None,
) -> Purged:
    """Forget cached answers."""
    service: Service = request.app.state.service
    caller: Key = request.scope["state"].get("key", NOBODY)
    wanted = _owner(key, tenant, caller)
    if (everyone or wanted != caller.owner) and not caller.admin:
        raise Forbidden("you may remove the cached answers of your own key or tenant; others need an admin key")
    return Purged(object="cache.purged", num_answers=await service.cache.purge(None if everyone else wanted))


def _owner(key: str | None, tenant: str | None, caller: Key) -> str:
    if tenant:
        return Key(id="", tenant=tenant).owner
    return Key.model_construct(id=key, tenant="").owner if key else caller.owner
