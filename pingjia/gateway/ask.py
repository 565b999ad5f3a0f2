"""From what a client asked to the backend's requests: the model, the sampling, the prompt's ids, room for the answer.

Every endpoint turns its body into an `Ask`; from there on all of them take the same way.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pingjia.chat.tokenizer import Tokenizer, check_text
from pingjia.errors import ModelError, ModelNotFound, PromptTooLong, RequestError
from pingjia.gateway.bodies import SamplingBody
from pingjia.gateway.grammar import grammar_of
from pingjia.gateway.settings import GatewaySettings
from pingjia.gateway.tools import NO_TOOLS, Toolbox
from pingjia.types import Message, ModelCard, Request, Sampling

_INT64 = 2**63
_MOST_TOKENS = 1_000_000
_PASSED_ON = (
    "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "ignore_eos", "min_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that is tokenised already."""

    ids: tuple[int, ...]


AskedPrompt = str | tuple[Message, ...] | TokenIds


@dataclass(frozen=True, slots=True)
class Ask:
    """One HTTP request, understood. `sampling.max_tokens` is not decided yet.

    max_total: a limit of prompt and answer together, which the answer may use up (ChatGLM's max_length).
    prompt_field, max_field: what the client calls these, for the messages.
    refusal: the answer, word for word, where a rule gives it and the model is not asked. toolbox: what it may call.
    passed: the body as the client wrote it, where another server answers.
    """

    id: str
    card: ModelCard
    prompts: tuple[AskedPrompt, ...]
    sampling: Sampling
    n: int = 1
    max_tokens: int | None = None
    max_total: int | None = None
    prompt_field: str = "messages"
    max_field: str = "max_tokens"
    refusal: str | None = None
    toolbox: Toolbox = NO_TOOLS
    passed: Mapping[str, Any] | None = None

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n


def served(cards: Sequence[ModelCard], settings: GatewaySettings) -> list[ModelCard]:
    """The cards under the names clients use: the base model may be called otherwise outside."""
    name = settings.served_model_name
    base = next((card for card in cards if card.parent is None), None)
    if name is None or base is None:
        return list(cards)
    return [
        dataclasses.replace(card, id=name)
        if card is base
        else dataclasses.replace(card, parent=name if card.parent == base.id else card.parent)
        for card in cards
    ]


def choose(cards: Sequence[ModelCard], name: str | None, settings: GatewaySettings) -> ModelCard:
    """The card a request means. Raises ModelNotFound, or RequestError when it names none and there are several."""
    names = ", ".join(card.id for card in cards) or "none"
    name = name if name is not None else settings.default_model
    if name is None:
        if len(cards) == 1:
            return cards[0]
        raise RequestError(f"model: missing; this server has {names}", param="model", code="invalid_value")
    for card in cards:
        if card.id == name:
            return card
    raise ModelNotFound(f"model {name[:200]!r} is not served here; this server has {names}")


def sampling_of(body: SamplingBody, settings: GatewaySettings, logprobs: int | None) -> Sampling:
    """The body's wishes as `Sampling`. Raises RequestError naming the field."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    for text in stop:
        check_text(text, "stop", "stop")
    given = {name: getattr(body, name) for name in _PASSED_ON if getattr(body, name) is not None}
    return Sampling(
        max_tokens=_MOST_TOKENS,
        temperature=settings.default_temperature if body.temperature is None else body.temperature,
        top_k=0 if body.top_k in (None, -1) else body.top_k,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        logit_bias=_bias(body.logit_bias or {}),
        grammar=grammar_of(body),
        **given,
    )


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    odd = next((token for token in given if not re.fullmatch("[0-9]{1,9}", token)), None)
    if odd is not None:
        raise RequestError(f"logit_bias: {odd[:40]!r} is not a token id", param="logit_bias", code="invalid_value")
    return {int(token): value for token, value in given.items()}


def check_options(body: SamplingBody, num_prompts: int, settings: GatewaySettings) -> None:
    """Refuse what contradicts itself or could never be admitted. Raises RequestError."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    num = num_prompts * (body.n or 1)
    if num > settings.max_concurrent:
        field = "n" if (body.n or 1) > 1 else "prompt"
        raise RequestError(
            f"{field}: {num} answers in one request; this server works on at most {settings.max_concurrent} at once",
            param=field,
            code="invalid_value",
        )


def token_ids(prompt: AskedPrompt, tokenizer: Tokenizer, field: str, tools: Sequence[str] = ()) -> tuple[int, ...]:
    """The prompt's ids. Raises RequestError (param `field`) for one without tokens, or with impossible ones."""
    try:
        return _token_ids(prompt, tokenizer, tools)
    except (RequestError, ModelError) as e:  # a model without a chat template cannot be chatted with
        code = e.code if isinstance(e, RequestError) else None
        raise RequestError(str(e), param=field, code=code or "invalid_value") from None


def _token_ids(prompt: AskedPrompt, tokenizer: Tokenizer, tools: Sequence[str]) -> tuple[int, ...]:
    if isinstance(prompt, TokenIds):
        ids = prompt.ids
        bad = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"prompt: token id {bad} is outside 0..{tokenizer.vocab_size - 1}", param="prompt", code="invalid_value"
            )
    elif isinstance(prompt, str):
        ids = tuple(tokenizer.render_text(prompt))
    else:
        ids = tuple(tokenizer.render(prompt, tools=tools))
    if not ids:
        raise RequestError("prompt: empty; give at least one token", param="prompt", code="invalid_value")
    return ids


def requests_of(ask: Ask, prompts_ids: Sequence[tuple[int, ...]], settings: GatewaySettings) -> tuple[Request, ...]:
    """One backend request per choice, prompt by prompt. Raises PromptTooLong.

    The choices of one prompt differ in their seeds: seed, seed + 1, ... from the client's or a random one.
    """
    requests = []
    for p, ids in enumerate(prompts_ids):
        sampling = dataclasses.replace(ask.sampling, max_tokens=_room(len(ids), ask, settings))
        for j, seed in enumerate(seeds_of(ask.sampling.seed, ask.n)):
            request_id = f"{ask.id}-{p * ask.n + j}"
            adapter = ask.card.id if ask.card.parent else None
            requests.append(Request(request_id, ids, dataclasses.replace(sampling, seed=seed), adapter))
    return tuple(requests)


def seeds_of(seed: int | None, n: int) -> list[int | None]:
    """The seeds of the `n` choices of one prompt."""
    if n == 1:
        return [seed]
    first = secrets.randbits(31) if seed is None else seed
    return [(first + j + _INT64) % (2 * _INT64) - _INT64 for j in range(n)]


def _room(num_prompt: int, ask: Ask, settings: GatewaySettings) -> int:
    # 0: the backend does not say. The words are those that clients know such an error by.
    limit, name = ask.card.max_model_len or 1_000_000, "this model's maximum context length"
    if ask.max_total is not None and ask.max_total < limit:
        limit, name = ask.max_total, "max_length"
    left = limit - num_prompt
    if left < (ask.max_tokens or 1):
        raise PromptTooLong(_too_long(num_prompt, ask, limit, name), param=ask.prompt_field)
    if ask.max_tokens is not None:
        return ask.max_tokens
    return left if ask.max_total is not None else min(left, settings.default_max_tokens)


def _too_long(num_prompt: int, ask: Ask, limit: int, name: str) -> str:
    if ask.max_tokens is None or num_prompt >= limit:
        advice = f"shorten the prompt by at least {num_prompt - limit + 1} tokens"
        return f"the prompt has {num_prompt} tokens and {name} is {limit}, prompt and answer together; {advice}"
    total = num_prompt + ask.max_tokens
    return (
        f"the prompt has {num_prompt} tokens and {ask.max_field} is {ask.max_tokens}, together {total}; "
        f"{name} is {limit}; ask for at most {limit - num_prompt} or shorten the prompt"
    )
