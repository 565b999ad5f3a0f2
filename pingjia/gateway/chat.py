"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.errors import RequestError
from pingjia.gateway.ask import Ask, check_options, sampling_of
from pingjia.gateway.bodies import ChatBody, ChatMessage, refuse
from pingjia.gateway.logprobs import LogprobReader
from pingjia.gateway.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    TokenLogprobOut,
    TopLogprob,
    UsageOut,
)
from pingjia.gateway.service import Service
from pingjia.types import Chunk, Completion, Message, TokenLogprob, Usage


def understand(body: ChatBody, service: Service) -> Ask:
    """The body as an Ask. Raises RequestError naming the field."""
    refuse(body)
    check_options(body, 1, service.settings)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    newer = body.max_completion_tokens is not None
    return Ask(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        card=service.card(body.model),
        prompts=(_conversation(body.messages),),
        sampling=sampling_of(body, service.settings, (body.top_logprobs or 0) if body.logprobs else None),
        n=body.n or 1,
        max_tokens=body.max_completion_tokens if newer else body.max_tokens,
        max_field="max_completion_tokens" if newer else "max_tokens",
    )


def _conversation(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    if messages and messages[-1].role == "assistant":
        # A template closes the assistant's turn, so the model would not continue it but answer itself.
        raise RequestError(
            "messages: the last one is the assistant's; continuing an answer is not supported, end with a user message",
            param="messages",
            code="invalid_value",
        )
    return tuple(Message("system" if m.role == "developer" else m.role, m.text) for m in messages)


class ChatShape:
    """Writes one chat answer, whole or as chunks."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self._ask = ask
        self._created = int(time.time())
        self._usage_field: dict[str, None] = {"usage": None} if include_usage else {}
        readers = range(ask.num_choices) if ask.sampling.logprobs is not None else ()
        self._readers = {i: LogprobReader(tokenizer) for i in readers}

    def whole(self, completions: Sequence[Completion], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self._ask.id,
            object="chat.completion",
            created=self._created,
            model=self._ask.card.id,
            choices=[self._choice(i, c) for i, c in enumerate(completions)],
            usage=UsageOut.of(usage),
        )

    def opening(self, index: int) -> ChatChunk:
        return self._chunk(index, Delta(role="assistant", content=""), None, None)

    def piece(self, index: int, chunk: Chunk) -> ChatChunk | None:
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        delta = Delta(content=chunk.text) if chunk.text or chunk.logprobs else Delta()
        return self._chunk(index, delta, self._logprobs(index, chunk.logprobs), chunk.finish_reason)

    def closing(self, usage: Usage) -> ChatChunk | None:
        return self._event(choices=[], usage=UsageOut.of(usage)) if self._usage_field else None

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=completion.text),
            logprobs=self._logprobs(index, completion.logprobs),
            finish_reason=completion.finish_reason,
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
