"""/tokenize and /detokenize, in vLLM's form: what a prompt comes to, without asking the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from pingjia.chat.tokenizer import Tokenizer
from pingjia.errors import ModelError, RequestError
from pingjia.gateway.ask import TokenIds, token_ids
from pingjia.gateway.bodies import Body, ChatMessage, refuse
from pingjia.gateway.chat import conversation
from pingjia.gateway.responses import Out
from pingjia.gateway.routes import JSON_ONLY, caller_of, errors_of, service_of
from pingjia.gateway.tools import checked, shown
from pingjia.types import Message

router = APIRouter()


class TokenizeBody(Body):
    """A text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="what the model wants around a text; true")
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = Field(None, description="the head of the answer, after messages; true")
    return_token_strs: bool | None = None


class Tokenized(Out):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


class Detokenized(Out):
    prompt: str


@router.post(
    "/tokenize",
    response_model_exclude_unset=True,
    dependencies=JSON_ONLY,
    responses=errors_of(400, 401, 404, 408, 413, 415, 429, 500, 503),
)
async def tokenize(body: TokenizeBody, request: Request) -> Tokenized:
    """The ids of a text, or of a conversation in the model's form."""
    service, caller = service_of(request), caller_of(request)
    card = service.card(body.model)
    prompt = _prompt(body)
    async with service.guard.visit(caller.key, card.id, 0, caller.headers):
        ids = await service.in_renderer(_size(prompt), lambda: _ids(body, prompt, service.tokenizer))
    strings = {"token_strs": _strings(ids, service.tokenizer)} if body.return_token_strs else {}
    return Tokenized(count=len(ids), max_model_len=card.max_model_len, tokens=list(ids), **strings)


@router.post("/detokenize", dependencies=JSON_ONLY, responses=errors_of(400, 401, 404, 408, 413, 415, 429, 500, 503))
async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """The text of ids, special tokens left out."""
    service, caller = service_of(request), caller_of(request)
    card = service.card(body.model)
    async with service.guard.visit(caller.key, card.id, 0, caller.headers):
        ids = token_ids(TokenIds(tuple(body.tokens)), service.tokenizer, "tokens") if body.tokens else ()
        text = await service.in_renderer(4 * len(ids), lambda: service.tokenizer.decode(ids))
    return Detokenized(prompt=text)


def _prompt(body: TokenizeBody) -> str | tuple[Message, ...]:
    refuse(body)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt", code="invalid_value")
    return body.prompt if body.prompt is not None else conversation(body.messages or [])


def _ids(body: TokenizeBody, prompt: str | tuple[Message, ...], tokenizer: Tokenizer) -> Sequence[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) if body.add_special_tokens is False else tokenizer.render_text(prompt)
    try:
        return tokenizer.render(prompt, body.add_generation_prompt is not False, shown(checked(body.tools or ())))
    except ModelError as e:
        raise RequestError(str(e), param="messages", code="invalid_value") from None


def _strings(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each alone: a token that is part of a character comes out as U+FFFD."""
    return [tokenizer.special_text(i) or tokenizer.decode([i]) for i in ids]


def _size(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.text) for message in prompt)
