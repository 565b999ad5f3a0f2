"""Rows that are too long for training: left out, with a shorter question, or as several rows.

The answer and its end token are never cut: a model that never sees an end never stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.encode import encode_example
from pingjia.data.problems import Finding, Problem
from pingjia.types import Example, Message

Policy = Literal["drop", "truncate-prompt", "split-turns"]
RULE = "length"
CUT_MARK = " … "
MIN_QUESTION = 16  # characters a question keeps at least
_MAX_TRIES = 12  # halvings while looking for the longest question that fits: exact for questions up to 4,096 characters


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a row became: examples with their numbers of tokens. `lost`: why (a part of) it is left out; `changes`: how
    what is kept differs from the row."""

    kept: tuple[tuple[Example, int], ...] = ()
    lost: tuple[Finding, ...] = ()
    changes: tuple[Finding, ...] = ()


def fit(example: Example, tokenizer: Tokenizer, cutoff_len: int, policy: Policy) -> Fitted:
    """Bring an example to at most `cutoff_len` tokens, as the policy says. One that fits comes back as it is.

    drop: it is left out. truncate-prompt: turns before the last question are left out, oldest first, then the middle of
    that question. split-turns: several rows, each of whole turns, each with the system message; every turn in one row.
    """
    size = _size(example, tokenizer)
    if isinstance(size, Finding):
        return Fitted(lost=(size,))
    if size <= cutoff_len:
        return Fitted(kept=((example, size),))
    if policy == "truncate-prompt":
        return _truncate(example, tokenizer, cutoff_len, size)
    if policy == "split-turns":
        return _split(example, tokenizer, cutoff_len, size)
    return Fitted(lost=(_too_long(size, cutoff_len, "cut, it would lose its end"),))


def _size(example: Example, tokenizer: Tokenizer) -> int | Finding:
    encoded = encode_example(example, tokenizer, None)
    if isinstance(encoded, Problem):
        return Finding("template", encoded.field, encoded.reason)
    return len(encoded.ids)


def _too_long(size: int, cutoff_len: int, why: str) -> Finding:
    return Finding(RULE, RULE, f"{size:,} tokens, over cutoff_len {cutoff_len:,}; {why}, so the row is left out")


# ---- truncate-prompt


def _truncate(example: Example, tokenizer: Tokenizer, cutoff_len: int, size: int) -> Fitted:
    num_cut = 0
    for shorter in _without_oldest(example):
        num_cut += 1
        now = _size(shorter, tokenizer)
        if isinstance(now, int) and now <= cutoff_len:
            return _shortened(shorter, now, size, cutoff_len, f"the {num_cut} oldest turns left out")
        example = shorter
    return _shorten_question(example, tokenizer, cutoff_len, size, num_cut)


def _without_oldest(example: Example) -> Iterator[Example]:
    """The example without its oldest question and answer, and so on down to the last question."""
    head, rounds = _rounds(example)
    for first in range(1, len(rounds)):
        yield replace(example, messages=(*head, *(m for turns in rounds[first:] for m in turns)))


def _shorten_question(example: Example, tokenizer: Tokenizer, cutoff_len: int, size: int, num_cut: int) -> Fitted:
    at = max(i for i, m in enumerate(example.messages) if m.role == "user")
    question = example.messages[at].content

    def keeping(num_chars: int) -> Example:
        text = _without_middle(question, num_chars)
        turn = replace(example.messages[at], content=text)
        return replace(example, messages=(*example.messages[:at], turn, *example.messages[at + 1 :]))

    def fits(num_chars: int) -> bool:
        now = _size(keeping(num_chars), tokenizer)
        return isinstance(now, int) and now <= cutoff_len

    if len(question) <= MIN_QUESTION or not fits(MIN_QUESTION):
        return Fitted(lost=(_too_long(size, cutoff_len, "the answer leaves no room for the question"),))
    num_chars = _largest(MIN_QUESTION, len(question), fits)
    done = keeping(num_chars)
    now = _size(done, tokenizer)
    assert isinstance(now, int)
    turns = f"the {num_cut} oldest turns left out, " if num_cut else ""
    how = f"{turns}{len(question) - num_chars:,} of {len(question):,} characters cut from the middle of the question"
    return _shortened(done, now, size, cutoff_len, how)


def _shortened(example: Example, now: int, size: int, cutoff_len: int, how: str) -> Fitted:
    reason = f"{size:,} tokens, over cutoff_len {cutoff_len:,}: {how}; now {now:,}"
    return Fitted(kept=((example, now),), changes=(Finding("truncated", "messages", reason),))


def _without_middle(text: str, num_chars: int) -> str:
    """`num_chars` of the text: two thirds from its beginning, where the task stands, the rest from its end."""
    head = (2 * num_chars + 2) // 3
    return text[:head] + CUT_MARK + text[len(text) - (num_chars - head) :]


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by halving; `low` does, `high` does not."""
    for _ in range(_MAX_TRIES):
        middle = (low + high) // 2
        if middle == low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- split-turns


def _split(example: Example, tokenizer: Tokenizer, cutoff_len: int, size: int) -> Fitted:
    head, rounds = _rounds(example)
    if len(rounds) == 1:
        return Fitted(lost=(_too_long(size, cutoff_len, "one question and answer cannot be split"),))
    kept: list[tuple[Example, int]] = []
    lost: list[Finding] = []
    taken: list[Sequence[Message]] = []
    for number, turns in enumerate(rounds, start=1):
        joined = _part(example, head, [*taken, turns], number == len(rounds))
        now = _size(joined, tokenizer)
        if taken and (isinstance(now, Finding) or now > cutoff_len):
            taken = []
            joined = _part(example, head, [turns], number == len(rounds))
            now = _size(joined, tokenizer)
        elif taken:
            kept.pop()  # this part grows by one more round
        if isinstance(now, int) and now <= cutoff_len:
            taken.append(turns)
            kept.append((joined, now))
        else:
            taken = []
            lost.append(_lost_round(number, now, cutoff_len))
    return _numbered(example, kept, lost, size, cutoff_len)


def _part(example: Example, head: Sequence[Message], rounds: Sequence[Sequence[Message]], is_last: bool) -> Example:
    messages = (*head, *(m for turns in rounds for m in turns))
    if is_last:
        return replace(example, messages=messages)
    return replace(example, messages=messages, facts=(), reference=None)  # those belong to the last answer


def _lost_round(number: int, size: int | Finding, cutoff_len: int) -> Finding:
    if isinstance(size, Finding):
        return size
    reason = f"question and answer {number} alone have {size:,} tokens, over cutoff_len {cutoff_len:,}; left out"
    return Finding(RULE, RULE, reason)


def _numbered(
    example: Example, kept: list[tuple[Example, int]], lost: list[Finding], size: int, cutoff_len: int
) -> Fitted:
    if not kept:
        return Fitted(lost=tuple(lost))
    parts = tuple((replace(part, where=f"{example.where}~part{i}"), now) for i, (part, now) in enumerate(kept, start=1))
    sizes = ", ".join(f"{now:,}" for _, now in kept)
    reason = f"{size:,} tokens, over cutoff_len {cutoff_len:,}: split into {len(kept)} rows of {sizes} tokens"
    return Fitted(kept=parts, lost=tuple(lost), changes=(Finding("split", "messages", reason),))


def _rounds(example: Example) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system message, and the turns from each question up to the next."""
    starts = [i for i, m in enumerate(example.messages) if m.role == "user"]
    ends = [*starts[1:], len(example.messages)]
    return example.messages[: starts[0]], [example.messages[a:b] for a, b in zip(starts, ends, strict=True)]
