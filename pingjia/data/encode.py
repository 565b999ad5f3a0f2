"""Examples -> token ids and what is learnt. A row that does not fit is left out and named; nothing is ever cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.problems import Problem
from pingjia.errors import DataError, RequestError
from pingjia.types import Encoded, Example


def encode_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, cutoff_len: int
) -> tuple[list[Encoded], list[Problem]]:
    """Encode examples; rows over `cutoff_len` tokens, or refused by the template, come back as problems.

    Raises DataError when no example is left or nothing in them would be learnt, ModelError when the template itself
    is unfit for training.
    """
    encoded: list[Encoded] = []
    problems: list[Problem] = []
    for example in examples:
        result = encode_example(example, tokenizer, cutoff_len)
        if isinstance(result, Problem):
            problems.append(result)
        else:
            encoded.append(result)
    _check_learnable(encoded, problems)
    return encoded, problems


def encode_example(example: Example, tokenizer: Tokenizer, cutoff_len: int | None) -> Encoded | Problem:
    """One example as ids, or why it is left out. `cutoff_len` None: any length."""
    try:
        encoded = tokenizer.encode_example(example)
    except RequestError as e:
        return _problem(example, "messages", str(e))
    size = len(encoded.ids)
    if cutoff_len is not None and size > cutoff_len:
        reason = f"{size} tokens, over cutoff_len {cutoff_len}; cut, it would lose its end, so the row is left out"
        return _problem(example, "length", reason)
    return encoded if example.weight == 1 else replace(encoded, weight=example.weight)


def _problem(example: Example, field: str, reason: str) -> Problem:
    file, _, line = example.where.rpartition(":")
    if not line.isdecimal():  # an example that was made, not read
        return Problem(example.where or "example", 0, field, reason)
    return Problem(file, int(line), field, reason)


def _check_learnable(encoded: list[Encoded], problems: list[Problem]) -> None:
    if not encoded:
        first = f"; the first of {len(problems)} left out: {problems[0]}" if problems else ""
        raise DataError(f"0 examples left to train on{first or '; check dataset, domains and max_samples'}")
    if not any(e.num_learnt for e in encoded):
        raise DataError(f"{len(encoded)} examples hold 0 tokens to learn: no answer in them is marked for learning")
