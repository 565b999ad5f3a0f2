"""Rows judged by BERTScore: how much two texts say the same. The encoder is brought by the caller.

Three comparisons, each with its own threshold: an answer against the row's reference; a made question against the one
it was made from; and, only when asked for, an answer against its question. The last says that both are about one
subject. It does not say that the answer is good: prompt against answer is no measure of quality.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pingjia.data.problems import Finding
from pingjia.similarity import TextEncoder, bert_score

Comparison = Literal["reference", "augmented", "relevance"]
_BATCH = 256
_WHAT = {
    "reference": "the answer against the row's reference",
    "augmented": "the question against the one it was made from",
    "relevance": "the answer against its question, which measures a common subject and not quality",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts of a record (by its number) to compare."""

    row: int
    text: str
    against: str


@dataclass(frozen=True, slots=True)
class Judged:
    """F1 of one pair, and what is wrong if it is below the threshold."""

    row: int
    f1: float
    finding: Finding | None


def judge_pairs(
    pairs: Iterable[Pair], encoder: TextEncoder, comparison: Comparison, threshold: float
) -> Iterator[Judged]:
    """BERTScore F1 of every pair, in order. Memory: one batch of pairs."""
    held: list[Pair] = []
    for pair in pairs:
        held.append(pair)
        if len(held) == _BATCH:
            yield from _judge(held, encoder, comparison, threshold)
            held = []
    yield from _judge(held, encoder, comparison, threshold)


def _judge(pairs: list[Pair], encoder: TextEncoder, comparison: Comparison, threshold: float) -> Iterator[Judged]:
    vectors = encoder.token_vectors([p.text for p in pairs] + [p.against for p in pairs])
    for number, pair in enumerate(pairs):
        f1 = bert_score(vectors[number], vectors[len(pairs) + number]).f1
        yield Judged(pair.row, f1, _finding(f1, comparison, threshold) if f1 < threshold else None)


def _finding(f1: float, comparison: Comparison, threshold: float) -> Finding:
    field = "prompt" if comparison == "augmented" else "response"
    reason = f"BERTScore F1 {f1:.3f} of {_WHAT[comparison]} is below {threshold:g}"
    return Finding(f"quality.{comparison}", field, reason)
