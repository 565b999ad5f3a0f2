"""The language front module: which language a conversation is in, and what a recipe's rules make of it.

Telling languages apart is `pingjia.language`; here is what short messages need besides: "OK" says little by itself, so
the conversation so far decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence

from prometheus_client import CollectorRegistry, Counter

from pingjia.chat.tokenizer import Tokenizer
from pingjia.gateway.ask import Ask
from pingjia.gateway.settings import GatewaySettings, LanguageRule
from pingjia.gateway.upstream_tokens import estimate_tokens
from pingjia.language import MIXED, UNKNOWN, identify
from pingjia.types import Chunk, Message, ModelCard, Request, Usage

HEADER = "x-language"
OTHER = "other"
_NAMED = ("zh", "en", MIXED, UNKNOWN)
_SURE = 0.6
_MAX_CHARS = 4_000  # the beginning of a text tells its language; a whole book would hold up the event loop
_MAX_TURNS = 20
_SHORT_HAN = 4
_WARM_UP = "La commande de Monsieur est partie hier"  # loads the model, which takes longer than a request may wait


def language_of(messages: Sequence[Message]) -> str:
    """The language of the user's last message: a code of two letters, mixed, or und where there are no words at all.

    A message that does not tell (no letters, one or two Latin words) takes the language of the latest one before it
    that does: the user's first, then the assistant's.
    """
    texts = [m.content for m in messages if m.role == "user"][::-1][:_MAX_TURNS]
    replies = [m.content for m in messages if m.role == "assistant"][::-1][:_MAX_TURNS]
    guess, is_sure = _guess(texts[0]) if texts else (UNKNOWN, False)
    if is_sure and not _may_be_japanese(texts[0], guess):
        return guess
    earlier = next((lang for text in [*texts[1:], *replies] for lang, sure in [_guess(text)] if sure), None)
    if is_sure:
        return "ja" if earlier == "ja" else guess
    return earlier or guess


def _guess(text: str) -> tuple[str, bool]:
    found = identify(text[:_MAX_CHARS])
    return found.lang, found.lang != UNKNOWN and found.confidence >= _SURE


def _may_be_japanese(text: str, guess: str) -> bool:
    """了解 is written alike in both."""
    return guess == "zh" and len(text.strip()) <= _SHORT_HAN


class LanguageFront:
    """Obeys the rules. `card` finds a model by its name; it raises for one that is not there."""

    def __init__(
        self, settings: GatewaySettings, card: Callable[[str | None], ModelCard], registry: CollectorRegistry
    ) -> None:
        self._settings = settings
        self._card = card
        if settings.language.is_on:
            identify(_WARM_UP)
        self._counts = Counter(
            "pingjia_requests_by_language", "Chat requests: zh, en, mixed, und, other", ["language"], registry=registry
        )

    def apply(self, ask: Ask, named: str | None, headers: MutableMapping[str, str]) -> Ask:
        """The request as the rule for its language has it. `named`: the model that the client gave, if any.

        Raises ModelNotFound for a rule whose model is not served.
        """
        if not self._settings.language.is_on:
            return ask
        messages = _conversation(ask)
        language = language_of(messages)
        headers[HEADER] = language
        self._counts.labels(language if language in _NAMED else OTHER).inc()
        rule = self.rule(language)
        return ask if rule is None else self._obey(rule, ask, messages, named)

    def rule(self, language: str) -> LanguageRule | None:
        """The language's own rule, else that for others; English, Chinese, mixed and wordless are no others."""
        rules = self._settings.language.rules
        return rules.get(language) or (rules.get(OTHER) if language not in _NAMED else None)

    def _obey(self, rule: LanguageRule, ask: Ask, messages: tuple[Message, ...], named: str | None) -> Ask:
        if rule.refuse is not None:
            return dataclasses.replace(ask, refusal=rule.refuse)
        if rule.system is not None and not any(m.role == "system" for m in messages):
            messages = (Message("system", rule.system), *messages)
        card = self._card(rule.model) if rule.model is not None and self._is_open(ask, named) else ask.card
        return dataclasses.replace(ask, card=card, prompts=(messages,))

    def _is_open(self, ask: Ask, named: str | None) -> bool:
        """Whether the client left the choice of the model to the server. An adapter asked for by name is obeyed."""
        return named is None or ask.card.parent is None or named == self._settings.default_model


class Refusal:
    """A source of answers that are all one text; nothing is computed."""

    def __init__(self, text: str, tokenizer: Tokenizer | None) -> None:
        self._text = text
        self._ids = tuple(tokenizer.encode(text)) if tokenizer is not None else ()
        self._num_tokens = len(self._ids) if tokenizer is not None else estimate_tokens(text)

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        for index in range(request.sampling.n):
            yield Chunk(self._text, self._ids, index=index)
            usage = Usage(request.num_prompt, self._num_tokens)
            yield Chunk(finish_reason="stop", usage=usage, index=index)


def _conversation(ask: Ask) -> tuple[Message, ...]:
    prompt = ask.prompts[0]
    assert isinstance(prompt, tuple)  # a chat
    return prompt
