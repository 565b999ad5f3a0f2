"""What of a client's request another server is told. Pure.

The body goes on as it came, fields that nobody here knows included. What the gateway itself decides is written anew:
the model's name there, the seed of each choice, the longest answer, and streaming, which is always asked for: so that
an answer nobody waits for ends at once. Not here: sending it (`upstream_server.py`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from pingjia.chat.tools import as_row
from pingjia.errors import RequestError
from pingjia.gateway.ask import Ask, AskedPrompt, TokenIds, check_options, seeds_of
from pingjia.gateway.bodies import CompletionBody, SamplingBody
from pingjia.gateway.settings import GatewaySettings
from pingjia.gateway.upstream_tokens import estimate_prompt, estimate_tokens
from pingjia.types import Message, ModelCard, Passed, Request, Sampling

_WRITTEN_ANEW = ("model", "stream", "stream_options", "n", "seed", "max_tokens", "max_completion_tokens")
_MOST_TOKENS = 1_000_000
_IMAGE_TOKENS = 300  # most servers take 85 to 1,500 for a picture
_EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos")


class PassedChatBody(SamplingBody):
    """POST /v1/chat/completions, for another server: messages and all further fields are passed on as they are."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens; wins over it")


Named = Callable[[str | None], ModelCard]
"""Finds the model of a request by its name; raises when there is none."""


def chat_ask(body: PassedChatBody, card: Named, settings: GatewaySettings) -> Ask:
    """The body as an Ask. Raises RequestError naming the field."""
    check_options(body, 1, settings)
    newer = body.max_completion_tokens is not None
    return Ask(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        card=card(body.model),
        prompts=(tuple(_message(row, i) for i, row in enumerate(body.messages)),),
        sampling=_sampling(body, settings),
        n=body.n or 1,
        max_tokens=body.max_completion_tokens if newer else body.max_tokens,
        max_field="max_completion_tokens" if newer else "max_tokens",
        passed=_raw(body),
    )


def completion_ask(
    body: CompletionBody, prompts: tuple[AskedPrompt, ...], card: Named, settings: GatewaySettings
) -> Ask:
    """The same of a completion."""
    check_options(body, len(prompts), settings)
    return Ask(
        id=f"cmpl-{uuid.uuid4().hex}",
        card=card(body.model),
        prompts=prompts,
        sampling=_sampling(body, settings),
        n=body.n or 1,
        max_tokens=body.max_tokens,
        prompt_field="prompt",
        passed=_raw(body),
    )


def _sampling(body: SamplingBody, settings: GatewaySettings) -> Sampling:
    """What of it matters here: whether the answer is repeatable. The rest is in the body."""
    temperature = settings.default_temperature if body.temperature is None else body.temperature
    return Sampling(max_tokens=_MOST_TOKENS, temperature=temperature, seed=body.seed)


def _raw(body: SamplingBody) -> dict[str, Any]:
    said = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {name: value for name, value in said.items() if value is not None}


def _message(row: Mapping[str, Any], index: int) -> Message:
    """The turn as the language front module and the estimate of tokens read it."""
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str):
        raise RequestError(f"messages[{index}].role: missing or no string", param=f"messages[{index}].role",
                           code="invalid_value")  # fmt: skip
    if content is not None and not isinstance(content, str | list):
        raise RequestError(
            f"messages[{index}].content: must be a string or a list of parts, not {type(content).__name__}",
            param=f"messages[{index}].content",
            code="invalid_value",
        )
    return Message(role, content if isinstance(content, str) else "".join(_texts(content or [])))


def _texts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            yield text


# ---- requests


def requests_of(ask: Ask, settings: GatewaySettings, correct: Callable[[int], int]) -> tuple[Request, ...]:
    """One request per choice, prompt by prompt. `correct`: tokens as estimated -> as the server would count."""
    requests = []
    for p, prompt in enumerate(ask.prompts):
        num_prompt = correct(_estimate(prompt, ask))
        max_tokens = _room(num_prompt, ask, settings)
        passed = _passed(ask, prompt, max_tokens, num_prompt)
        sampling = replace(ask.sampling, max_tokens=max_tokens)
        for j, seed in enumerate(seeds_of(ask.sampling.seed, ask.n)):
            request_id = f"{ask.id}-{p * ask.n + j}"
            requests.append(Request(request_id, (), replace(sampling, seed=seed), ask.card.id, passed))
    return tuple(requests)


def _room(num_prompt: int, ask: Ask, settings: GatewaySettings) -> int:
    """The longest answer. What the client said is passed on; whether it fits, the server knows better."""
    if ask.max_tokens is not None:
        return ask.max_tokens
    limit = ask.max_total or ask.card.max_model_len
    most = limit - num_prompt if limit else _MOST_TOKENS
    return max(1, most if ask.max_total else min(most, settings.default_max_tokens))


def _passed(ask: Ask, prompt: AskedPrompt, max_tokens: int, num_prompt: int) -> Passed:
    said = dict(_composed(ask) if ask.passed is None else ask.passed)
    asked: dict[str, Any]
    if isinstance(prompt, str | TokenIds):
        path, asked = "completions", {"prompt": prompt if isinstance(prompt, str) else list(prompt.ids)}
    else:
        path, asked = "chat/completions", {"messages": _rows(prompt, said.get("messages"))}
    said = {k: v for k, v in said.items() if k not in _WRITTEN_ANEW}
    said |= {**asked, "temperature": ask.sampling.temperature, _max_field(ask): max_tokens}
    return Passed(path, json.dumps(said, sort_keys=True), num_prompt)


def _max_field(ask: Ask) -> str:
    return "max_completion_tokens" if ask.max_field == "max_completion_tokens" else "max_tokens"


def _rows(prompt: tuple[Message, ...], said: Any) -> list[dict[str, Any]]:
    """The messages as the client wrote them, behind what a rule for their language has put before them."""
    if said is None:
        return [as_row(message) for message in prompt]
    return [*(as_row(message) for message in prompt[: len(prompt) - len(said)]), *said]


def _composed(ask: Ask) -> dict[str, Any]:
    """The body of a request that came in another form than OpenAI's: what differs from the defaults."""
    plain, sampling = Sampling(), ask.sampling
    changed = [name for name in ("top_p", *_EXTENSIONS) if getattr(sampling, name) != getattr(plain, name)]
    return {name: getattr(sampling, name) for name in changed}


def _estimate(prompt: AskedPrompt, ask: Ask) -> int:
    if isinstance(prompt, TokenIds):
        return len(prompt.ids)
    if isinstance(prompt, str):
        return estimate_tokens(prompt)
    said: Mapping[str, Any] = ask.passed or {}
    tools = json.dumps(said["tools"], ensure_ascii=False) if said.get("tools") else ""
    num_parts = sum(len(m["content"]) for m in said.get("messages", ()) if isinstance(m.get("content"), list))
    num_texts = sum(
        sum(1 for _ in _texts(m["content"])) for m in said.get("messages", ()) if isinstance(m.get("content"), list)
    )
    calls = sum(len(json.dumps(m["tool_calls"])) for m in said.get("messages", ()) if m.get("tool_calls"))
    texts = [message.text for message in prompt]
    return estimate_prompt(texts) + estimate_tokens(tools) + calls // 3 + _IMAGE_TOKENS * (num_parts - num_texts)
