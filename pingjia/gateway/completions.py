"""POST /v1/completions: raw prompts, several in one request, or token ids."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.gateway.ask import Ask, AskedPrompt, TokenIds, check_options, sampling_of
from pingjia.gateway.bodies import CompletionBody, refuse
from pingjia.gateway.logprobs import LogprobReader
from pingjia.gateway.responses import CompletionChoice, CompletionLogprobs, Out, TextCompletion, UsageOut
from pingjia.gateway.service import Service
from pingjia.gateway.upstream_body import completion_ask
from pingjia.gateway.upstream_merge import merged_text
from pingjia.gateway.upstream_shape import with_foreign, with_foreign_piece
from pingjia.types import Chunk, Completion, TokenLogprob, Usage


def understand(body: CompletionBody, service: Service) -> Ask:
    """The body as an Ask. Raises RequestError naming the field."""
    prompts = _prompts(body.prompt)
    if service.upstream is not None:
        return completion_ask(body, prompts, service.card, service.settings)
    refuse(body)
    check_options(body, len(prompts), service.settings)
    return Ask(
        id=f"cmpl-{uuid.uuid4().hex}",
        card=service.card(body.model),
        prompts=prompts,
        sampling=sampling_of(body, service.settings, body.logprobs),
        n=body.n or 1,
        max_tokens=body.max_tokens,
        prompt_field="prompt",
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[AskedPrompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (_one(prompt),)
    return tuple(_one(item) for item in prompt)


def _one(prompt: Any) -> AskedPrompt:
    return prompt if isinstance(prompt, str) else TokenIds(tuple(prompt))


class CompletionShape:
    """Writes one completion, whole or as chunks. Choices are numbered prompt by prompt."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self._ask = ask
        self._created = int(time.time())
        self._usage_field: dict[str, None] = {"usage": None} if include_usage else {}
        readers = range(ask.num_choices) if ask.sampling.logprobs is not None else ()
        self._readers = {i: LogprobReader(tokenizer) for i in readers}
        self._offsets = [0] * ask.num_choices

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Out:
        choices = [self._choice(i, c.text, c.logprobs, c.finish_reason) for i, c in enumerate(completions)]
        return with_foreign(self._event(choices=choices, usage=UsageOut.of(usage)), completions, merged_text)

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, chunk: Chunk) -> Out | None:
        if chunk.foreign:
            event = self._event(choices=[self._choice(index, "", (), chunk.finish_reason)], **self._usage_field)
            return with_foreign_piece(event, chunk.foreign)
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        choice = self._choice(index, chunk.text, chunk.logprobs, chunk.finish_reason)
        return self._event(choices=[choice], **self._usage_field)

    def closing(self, usage: Usage) -> TextCompletion | None:
        return self._event(choices=[], usage=UsageOut.of(usage)) if self._usage_field else None

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: Any) -> CompletionChoice:
        return CompletionChoice(
            index=index, text=text, logprobs=self._logprobs(index, logprobs), finish_reason=finish_reason
        )

    def _event(self, **fields: Any) -> TextCompletion:
        return TextCompletion(
            id=self._ask.id, object="text_completion", created=self._created, model=self._ask.card.id, **fields
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        reader = self._readers.get(index)
        if reader is None:
            return None
        tokens = reader.read(logprobs)
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_best_by_text(token.top) for token in tokens],
            text_offset=offsets,
        )


def _best_by_text(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for text, logprob in sorted(top, key=lambda pair: -pair[1]):
        best.setdefault(text, logprob)  # two ids can have one text; the better one stands for it
    return best
