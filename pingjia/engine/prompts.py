"""What a caller may hand to `generate` -> requests. One prompt, many prompts, raw text or conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pingjia.chat import Tokenizer
from pingjia.errors import RequestError
from pingjia.types import Message, Prompt, Request, Sampling

Conversation = Sequence[Message | Mapping[str, Any]]
Prompts = Prompt | Conversation | Sequence[Prompt | Conversation]


def as_requests(
    prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None, adapter: str | None,
    tokenizer: Tokenizer, ids: Iterator[str],
) -> list[Request]:  # fmt: skip
    """Render every prompt; one request for each of its `n` answers, prompt by prompt, with seeds seed, seed + 1, ...

    A single string or a single conversation counts as one prompt. Raises RequestError for prompts that cannot be
    rendered or a number of samplings that does not match.
    """
    many = _as_list(prompts)
    samplings = _as_samplings(sampling, len(many))
    return [
        Request(next(ids), prompt_ids, one, adapter)
        for prompt, chosen in zip(many, samplings, strict=True)
        for prompt_ids in (tuple(_render(prompt, tokenizer)),)
        for one in _single(chosen)
    ]


def _single(sampling: Sampling) -> list[Sampling]:
    """The sampling of each of its answers."""
    if sampling.n == 1:
        return [sampling]
    seeds = [None if sampling.seed is None else sampling.seed + k for k in range(sampling.n)]
    return [replace(sampling, n=1, seed=seed) for seed in seeds]


def _as_list(prompts: Prompts) -> list[Prompt | Conversation]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Message | Mapping)):
        return [prompts]  # type: ignore[list-item]  # one prompt, not a sequence of them
    return list(prompts)  # type: ignore[arg-type]


def _as_samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    if len(sampling) != count:
        raise RequestError(
            f"{len(sampling)} samplings for {count} prompts; give one, or one for each", param="sampling"
        )
    return list(sampling)


def _render(prompt: Prompt | Conversation, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.render_text(prompt) if isinstance(prompt, str) else tokenizer.render(prompt)
