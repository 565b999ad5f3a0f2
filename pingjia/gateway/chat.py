"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pingjia.chat.tokenizer import Tokenizer, as_messages
from pingjia.errors import RequestError
from pingjia.gateway.ask import Ask, check_options, sampling_of
from pingjia.gateway.bodies import ChatBody, ChatMessage, refuse
from pingjia.gateway.logprobs import LogprobReader
from pingjia.gateway.responses import (
    AssistantMessage,
    CallDelta,
    CalledFunction,
    CallOut,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Out,
    TokenLogprobOut,
    TopLogprob,
    UsageOut,
)
from pingjia.gateway.service import Service
from pingjia.gateway.tools import CallReader, Toolbox, toolbox_of
from pingjia.gateway.upstream_body import PassedChatBody, chat_ask
from pingjia.gateway.upstream_merge import merged_chat
from pingjia.gateway.upstream_shape import with_foreign, with_foreign_piece
from pingjia.types import Chunk, Completion, Message, Sampling, TokenLogprob, ToolCall, Usage


def understand(body: ChatBody | PassedChatBody, service: Service) -> Ask:
    """The body as an Ask. Raises RequestError naming the field."""
    if isinstance(body, PassedChatBody):
        return chat_ask(body, service.card, service.settings)
    refuse(body)
    check_options(body, 1, service.settings)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    newer = body.max_completion_tokens is not None
    toolbox = toolbox_of(body)
    return Ask(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        card=service.card(body.model),
        prompts=(_question(body.messages),),
        sampling=_sampling(body, service, toolbox),
        n=body.n or 1,
        max_tokens=body.max_completion_tokens if newer else body.max_tokens,
        max_field="max_completion_tokens" if newer else "max_tokens",
        toolbox=toolbox,
    )


def _sampling(body: ChatBody, service: Service, toolbox: Toolbox) -> Sampling:
    sampling = sampling_of(body, service.settings, (body.top_logprobs or 0) if body.logprobs else None)
    if sampling.grammar is not None and toolbox.names:
        raise RequestError(
            f"{sampling.grammar.asked_as} and tools contradict each other: an answer in that form can hold no call; "
            "leave one out, or give tool_choice: none",
            param="tools",
            code="invalid_value",
        )
    return replace(sampling, grammar=toolbox.grammar) if toolbox.grammar is not None else sampling


def _question(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    if messages and messages[-1].role == "assistant":
        # A template closes the assistant's turn, so the model would not continue it but answer itself.
        raise RequestError(
            "messages: the last one is the assistant's; continuing an answer is not supported, end with a user message",
            param="messages",
            code="invalid_value",
        )
    return conversation(messages)


def conversation(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages of a body as everybody else knows them. Raises RequestError."""
    rows = [_row(m) for m in messages]
    try:
        return as_messages(rows)
    except RequestError as e:
        raise RequestError(str(e), param="messages", code="invalid_value") from None


def _row(message: ChatMessage) -> Message | dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    row: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        row["tool_calls"] = message.tool_calls
    if role == "tool":
        row |= {"name": message.name, "tool_call_id": message.tool_call_id}
    return row if len(row) > 2 else Message(role, message.text)


class ChatShape:
    """Writes one chat answer, whole or as chunks."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self._ask = ask
        self._created = int(time.time())
        self._usage_field: dict[str, None] = {"usage": None} if include_usage else {}
        readers = range(ask.num_choices) if ask.sampling.logprobs is not None else ()
        self._readers = {i: LogprobReader(tokenizer) for i in readers}
        self._calls = {i: CallReader(ask.toolbox) for i in range(ask.num_choices)} if ask.toolbox.names else {}

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Out:
        answer = ChatCompletion(
            id=self._ask.id,
            object="chat.completion",
            created=self._created,
            model=self._ask.card.id,
            choices=[self._choice(i, c) for i, c in enumerate(completions)],
            usage=UsageOut.of(usage),
        )
        return with_foreign(answer, completions, merged_chat)

    def opening(self, index: int) -> ChatChunk:
        return self._chunk(index, Delta(role="assistant", content=""), None, None)

    def piece(self, index: int, chunk: Chunk) -> Out | None:
        if chunk.foreign:
            return with_foreign_piece(self._chunk(index, Delta(), None, chunk.finish_reason), chunk.foreign)
        if index in self._calls:
            return self._piece_with_calls(index, chunk)
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        delta = Delta(content=chunk.text) if chunk.text or chunk.logprobs else Delta()
        return self._chunk(index, delta, self._logprobs(index, chunk.logprobs), chunk.finish_reason)

    def _piece_with_calls(self, index: int, chunk: Chunk) -> ChatChunk | None:
        text, calls = self._calls[index].feed(chunk.text), tuple[ToolCall, ...]()
        if chunk.finish_reason is not None:
            rest, calls = self._calls[index].end()
            text += rest
        if not text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        said: dict[str, Any] = {"content": text} if text or chunk.logprobs else {}
        if calls:
            said["tool_calls"] = [_delta(i, call) for i, call in enumerate(calls)]
        reason = _reason(chunk.finish_reason, calls)
        return self._chunk(index, Delta(**said), self._logprobs(index, chunk.logprobs), reason)

    def closing(self, usage: Usage) -> ChatChunk | None:
        return self._event(choices=[], usage=UsageOut.of(usage)) if self._usage_field else None

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        text, calls = self._ask.toolbox.read(completion.text)
        called = {"tool_calls": [CallOut(**_call(call)) for call in calls]} if calls else {}
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=None if calls and not text else text, **called),
            logprobs=self._logprobs(index, completion.logprobs),
            finish_reason=_reason(completion.finish_reason, calls),
        )

    def _chunk(self, index: int, delta: Delta, logprobs: ChatLogprobs | None, finish_reason: Any) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return self._event(choices=[choice], **self._usage_field)

    def _event(self, **fields: Any) -> ChatChunk:
        return ChatChunk(
            id=self._ask.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._ask.card.id,
            **fields,
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        reader = self._readers.get(index)
        if reader is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprobOut(
                    token=token.text,
                    logprob=token.logprob,
                    bytes=list(token.text.encode()),
                    top_logprobs=[TopLogprob(token=t, logprob=p, bytes=list(t.encode())) for t, p in token.top],
                )
                for token in reader.read(logprobs)
            ]
        )


def _reason(reason: Any, calls: Sequence[ToolCall]) -> Any:
    """An answer that was cut off says so, whatever stands in it."""
    return "tool_calls" if calls and reason == "stop" else reason


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": CalledFunction(name=call.name, arguments=call.arguments),
    }


def _delta(index: int, call: ToolCall) -> CallDelta:
    return CallDelta(index=index, **_call(call))
