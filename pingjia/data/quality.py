"""Rows judged by BERTScore: how much two texts say the same. The encoder is brought by the caller.

Three comparisons, each with its own threshold: an answer against the row's reference; a made text against the one
it was made from; and, only when asked for, an answer against its question. The last says that both are about one
subject. It does not say that the answer is good: prompt against answer is no measure of quality.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pingjia.data.problems import Finding
from pingjia.similarity import TextEncoder, bert_score, encode_pairs

Comparison = Literal["reference", "augmented", "relevance"]
_WINDOW = 1024  # pairs whose texts are held, so that those of like length can be encoded together
_FEW_KNOWN = 0.25  # the share of unknown tokens from which on a score says little
_WHAT = {
    "reference": "the answer against the row's reference",
    "augmented": "the text against the one it was made from",
    "relevance": "the answer against its question, which measures a common subject and not quality",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts of a record (by its number) to compare. `field`: which of the record's texts `text` is, where the
    comparison does not say it: a made row's answer, say."""

    row: int
    text: str
    against: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """F1 of one pair, and what is wrong if it is below the threshold.

    `unknown`: the share of the tokens of the text that the encoder knows less of, for which it has no entry.
    """

    row: int
    f1: float
    finding: Finding | None
    unknown: float = 0.0


def judge_pairs(
    pairs: Iterable[Pair], encoder: TextEncoder, comparison: Comparison, threshold: float
) -> Iterator[Judged]:
    """BERTScore F1 of every pair, in order, without idf or rescaling. Memory: the texts of _WINDOW pairs."""
    waiting = iter(pairs)
    while window := list(itertools.islice(waiting, _WINDOW)):
        yield from _judge(window, encoder, comparison, threshold)


@dataclass(slots=True)
class Familiarity:
    """How much of the texts that were compared the encoder knows."""

    num_pairs: int = 0
    unknown: float = 0.0  # sum over the pairs

    def add(self, judged: Judged) -> None:
        self.num_pairs += 1
        self.unknown += judged.unknown

    def note(self, encoder: str) -> str | None:
        """What a reader of the scores must know when the encoder does not know the language of the texts."""
        share = self.unknown / max(1, self.num_pairs)
        if share < _FEW_KNOWN:
            return None
        return (
            f"the encoder {encoder} does not know {share:.0%} of the tokens of {self.num_pairs:,} compared pairs: its "
            "scores tell unrelated texts apart and little more; name an encoder of their language (quality.encoder)"
        )


def _judge(window: list[Pair], encoder: TextEncoder, comparison: Comparison, threshold: float) -> Iterator[Judged]:
    found: dict[int, Judged] = {}
    for i, left, right in encode_pairs([(pair.text, pair.against) for pair in window], encoder):
        f1, unknown = bert_score(left, right).f1, max(left.unknown, right.unknown)
        finding = _finding(window[i], f1, unknown, comparison, threshold) if f1 < threshold else None
        found[i] = Judged(window[i].row, f1, finding, unknown)
    return (found[i] for i in range(len(window)))


def _finding(pair: Pair, f1: float, unknown: float, comparison: Comparison, threshold: float) -> Finding:
    field = pair.field or ("prompt" if comparison == "augmented" else "response")
    reason = f"BERTScore F1 {_below(f1, threshold)} of {_WHAT[comparison]} is below {threshold:g}"
    if unknown >= _FEW_KNOWN:
        reason += f"; the encoder does not know {unknown:.0%} of the tokens"
    return Finding(f"quality.{comparison}", field, reason)


def _below(f1: float, threshold: float) -> str:
    """Three decimals, more where three would read as the threshold itself."""
    text = f"{f1:.3f}"
    return text if float(text) < threshold else f"{f1:.6f}"
