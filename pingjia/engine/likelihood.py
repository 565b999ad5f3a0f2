"""How likely a given answer is: one pass over prompt and answer, with logits after every token that is predicted.

Token ids and the arithmetic; pages and the network are lent by the engine for the length of one answer.

Shapes: A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from pingjia.chat import Tokenizer
from pingjia.engine.fused import FusedRunner
from pingjia.engine.runner import Runner
from pingjia.engine.sequence import Sequence as Tokens
from pingjia.engine.sequence import Slice
from pingjia.errors import RequestError
from pingjia.types import Example, Likelihood, Message, Prompt


def as_ids(prompt: Prompt, answer: str, tokenizer: Tokenizer, *, with_end: bool) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer as training has them; raw text goes on where the prompt ends.

    An empty text begins as the family's texts do, or after the token that ends one. Raises RequestError for an answer
    without a token.
    """
    if isinstance(prompt, str):
        prompt_ids = tokenizer.render_text(prompt) or [min(tokenizer.stop_ids)]
        answer_ids = _continued(prompt, answer, tokenizer)
    else:
        prompt_ids, answer_ids = _conversation(prompt, answer, tokenizer)
    if not with_end:
        answer_ids = _without_end(answer_ids, tokenizer)
    if not answer_ids:
        raise RequestError("an answer without a single token has no likelihood", param="answers")
    return prompt_ids, answer_ids


def likelihoods_of(runner: Runner | FusedRunner, prompt: Tokens, answers: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of answers to `prompt`, whose pages have room: one answer, or several of a single token, which share a pass."""
    longest = answers[0]
    assert len(answers) == 1 or all(len(answer) == 1 for answer in answers)
    prompt.tokens += longest[:-1]  # nothing is predicted after the last one
    piece = Slice(prompt, 0, prompt.num_tokens, samples=True, num_drafts=len(longest) - 1)
    logits_AV = runner.run([piece]).float()
    logprobs_AV, best_A = logits_AV.log_softmax(-1), logits_AV.argmax(-1)
    return [_likelihood(logprobs_AV, best_A, torch.tensor(list(a), device=logits_AV.device)) for a in answers]


def groups(asked: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(prompt, its answers): neighbours with one prompt, whose answers are a single token each, come together."""
    for (prompt, is_single), some in groupby(asked, key=lambda ids: (ids[0], len(ids[1]) == 1)):
        answers = [answer for _, answer in some]
        yield from [(prompt, answers)] if is_single else [(prompt, [answer]) for answer in answers]


def _likelihood(logprobs_AV: torch.Tensor, best_A: torch.Tensor, target_A: torch.Tensor) -> Likelihood:
    chosen_A = logprobs_AV.gather(1, target_A[:, None])[:, 0]
    return Likelihood(float(chosen_A.double().sum()), len(target_A), bool((best_A == target_A).all()))


def _continued(prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the answer as they are where it follows the prompt, unless the two grow together at the seam."""
    before, both = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(answer)


def _conversation(prompt: Sequence[Message], answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    turns = [replace(turn, learn=False) for turn in prompt]
    encoded = tokenizer.encode_example(Example((*turns, Message("assistant", answer))))
    learnt = [i for i, learn in enumerate(encoded.learn) if learn]
    start = len(tokenizer.render(turns))
    return list(encoded.ids[:start]), list(encoded.ids[start : learnt[-1] + 1]) if learnt else []


def _without_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    while ids and ids[-1] in tokenizer.stop_ids:
        ids = ids[:-1]
    return ids
