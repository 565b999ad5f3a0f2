"""The chat endpoint where other servers answer: it takes every message and field that they may take."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from pingjia.gateway import routes
from pingjia.gateway.responses import ChatChunk, ChatCompletion
from pingjia.gateway.upstream_body import PassedChatBody

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={**routes.events_of(ChatChunk), **routes.ACCEPTED, **routes.ANSWER_ERRORS},
    dependencies=routes.JSON_ONLY,
)
async def chat_completions(body: PassedChatBody, request: Request) -> Response:
    """Have a conversation answered by another server. Fields that this document does not name are passed on."""
    return await routes.answer_chat(body, request)
