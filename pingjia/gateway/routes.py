"""The endpoints and what the OpenAPI document says of them. Each one only says what was asked and how to write it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pingjia.errors import RequestError
from pingjia.gateway import chat, completions, demo
from pingjia.gateway.ask import Ask, choose
from pingjia.gateway.bodies import ChatBody, CompletionBody, DemoBody, SamplingBody
from pingjia.gateway.errors import WrongContentType
from pingjia.gateway.guard import check_model
from pingjia.gateway.jobs import Jobs, Kind
from pingjia.gateway.keys import NOBODY, Key
from pingjia.gateway.reply import stream_reply, whole_reply
from pingjia.gateway.responses import (
    ChatChunk,
    ChatCompletion,
    DemoAnswer,
    ErrorEnvelope,
    Health,
    JobOut,
    ModelList,
    ModelOut,
    TextCompletion,
)
from pingjia.gateway.service import Caller, Service
from pingjia.gateway.upstream_body import PassedChatBody
from pingjia.queue.job import Rank
from pingjia.trace import NO_SPAN
from pingjia.types import ModelCard

_REASONS = {
    400: "the request cannot be served as asked; `param` names the field",
    401: "no API key, or an unknown one",
    403: "this key may not do that",
    404: "no such model",
    408: "the body came too slowly",
    409: "the same Idempotency-Key with another body",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "a limit or the budget of the key is used up; with Retry-After where waiting helps",
    500: "the engine or the server failed",
    503: "too many answers in work (with Retry-After), or not ready",
    504: "the answer took longer than a request may",
    507: "the disk refused",
}


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of these."""
    declared: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorEnvelope, "description": _REASONS[status]} for status in statuses
    }
    # Also keeps FastAPI from declaring its own 422, which is never sent.
    return {**declared, "default": {"model": ErrorEnvelope, "description": "any other error"}}


def events_of(schema: type) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of a streamed answer: each event, as its 3.1 has it."""
    chunk, envelope = ({"$ref": f"#/components/schemas/{name}"} for name in (schema.__name__, ErrorEnvelope.__name__))
    json_text = {"type": "string", "contentMediaType": "application/json"}
    data = [{**json_text, "contentSchema": {"anyOf": [chunk, envelope]}}, {"const": "[DONE]", "description": "the end"}]
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}
    about = "the answer; with stream: true as events, with comments in between as a sign of life"
    return {200: {"description": about, "content": {"text/event-stream": {"schema": event}}}}


STREAMED = (ChatChunk,)
"""Models that only events have, so that FastAPI does not find them by itself."""

ANSWER_ERRORS = errors_of(*(status for status in _REASONS if status not in (403, 507)))
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": JobOut, "description": "with the header Prefer: respond-async; Location has the job"}
}
router = APIRouter()
chat_router = APIRouter()
"""Where other servers answer, `upstream_routes.py` has another."""
health_router = APIRouter()


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Who asks, and how."""
    state = request.scope["state"]
    key = state.get("key", NOBODY)
    caller = Caller(
        state["request_id"],
        key,
        _rank(key),
        cache_control=request.headers.get("cache-control", ""),
        span=state.get("span", NO_SPAN),
    )
    state["account"], state["headers"] = caller.account, caller.headers
    return caller


def _rank(key: Key) -> Rank:
    return "high" if key.priority > 0 else "low" if key.priority < 0 else "normal"


async def _json_only(request: Request) -> None:
    # A form or text body needs no CORS preflight: any web page could make a visitor's browser send it to this server.
    declared = request.headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise WrongContentType(
            f"the body is declared as {declared[:100] or 'nothing'}; send the header Content-Type: application/json"
        )


JSON_ONLY = [Depends(_json_only)]


@chat_router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={**events_of(ChatChunk), **ACCEPTED, **ANSWER_ERRORS},
    dependencies=JSON_ONLY,
)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    return await answer_chat(body, request)


async def answer_chat(body: ChatBody | PassedChatBody, request: Request) -> Response:
    """A conversation's answer, whole, as events, or later."""
    service, caller = service_of(request), caller_of(request)
    ask = service.front.apply(chat.understand(body, service), body.model, caller.headers)
    if _is_asynchronous(request, body) and ask.refusal is None:  # nothing to wait for
        return await _accepted(request, ask, "chat", caller)
    shape = chat.ChatShape(ask, service.tokenizer, include_usage=_wants_usage(body))
    return (stream_reply if body.stream else whole_reply)(service, ask, caller, shape)


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses={**events_of(TextCompletion), **ACCEPTED, **ANSWER_ERRORS},
    dependencies=JSON_ONLY,
)
async def text_completions(body: CompletionBody, request: Request) -> Response:
    """Continue raw text."""
    service, caller = service_of(request), caller_of(request)
    ask = completions.understand(body, service)
    if _is_asynchronous(request, body):
        return await _accepted(request, ask, "completion", caller)
    shape = completions.CompletionShape(ask, service.tokenizer, include_usage=_wants_usage(body))
    return (stream_reply if body.stream else whole_reply)(service, ask, caller, shape)


@router.post("/", response_model=DemoAnswer, responses=ANSWER_ERRORS, dependencies=JSON_ONLY)
async def chatglm_demo(body: DemoBody, request: Request) -> Response:
    """Answer in the form of ChatGLM-6B's demo server."""
    service, caller = service_of(request), caller_of(request)
    return whole_reply(service, demo.understand(body, service), caller, demo.DemoShape(body))


@router.get("/v1/models", responses=errors_of(401, 500))
async def list_models(request: Request) -> ModelList:
    """The base model and its adapters, as far as the key may use them."""
    key = request.scope["state"].get("key", NOBODY)
    return ModelList(object="list", data=[model_out(c) for c in service_of(request).cards() if key.may_use(c.id)])


@router.get("/v1/models/{model_id:path}", responses=errors_of(401, 404, 500))
async def get_model(model_id: str, request: Request) -> ModelOut:
    """One of them."""
    service = service_of(request)
    card = choose(service.cards(), model_id, service.settings)
    check_model(request.scope["state"].get("key", NOBODY), card.id)
    return model_out(card)


@router.get("/metrics", response_class=Response, responses={
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **errors_of(401, 500),
})  # fmt: skip
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@health_router.get("/health/live")
async def live(request: Request) -> Health:
    """200 as long as the server answers at all."""
    return _health(service_of(request))


_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "no token could come out now"}}


@health_router.get("/health", responses=_NOT_READY)
@health_router.get("/health/ready", responses=_NOT_READY)
async def ready(request: Request, response: Response) -> Health:
    """200 when a token could come out now, else 503."""
    health = _health(service_of(request))
    response.status_code = 200 if health.status == "ok" else 503
    return health


def _health(service: Service) -> Health:
    stats = service.backend.stats()
    return Health(
        status="ok" if service.is_ready() else "not ready",
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        seconds_since_step=stats.seconds_since_step,
    )


def model_out(card: ModelCard) -> ModelOut:
    return ModelOut(
        id=card.id,
        object="model",
        created=card.created,
        owned_by="pingjia",
        root=card.root,
        parent=card.parent,
        max_model_len=card.max_model_len,
    )


def _is_asynchronous(request: Request, body: SamplingBody) -> bool:
    wishes = {wish.strip().lower() for wish in request.headers.get("prefer", "").split(",")}
    if "respond-async" not in wishes:
        return False
    if body.stream:
        raise RequestError(
            "stream: true and Prefer: respond-async contradict each other; leave one out", param="stream"
        )
    return True


async def _accepted(request: Request, ask: Ask, kind: Kind, caller: Caller) -> Response:
    jobs: Jobs = request.app.state.jobs
    job = await jobs.accept(ask, kind, caller, await request.body(), request.headers.get("idempotency-key", ""))
    headers = {"location": f"/v1/jobs/{job.id}", "preference-applied": "respond-async"}
    return Response(job.dump(), status_code=202, media_type="application/json", headers=headers)


def _wants_usage(body: SamplingBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
