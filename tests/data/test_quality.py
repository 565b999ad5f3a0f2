"""Rows judged by BERTScore, with an encoder of characters; the real one is measured in benchmarks/bert_score.py."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from pingjia.data import quality
from pingjia.data.problems import Finding
from pingjia.data.quality import Comparison, Familiarity, Judged, Pair, judge_pairs
from pingjia.similarity import Vectors, bert_scores

KNOWN = "冰箱保修多久三年整机"


class Letters:
    """A character is a token; equal ones have equal vectors. Those outside KNOWN count as unknown."""

    def __init__(self) -> None:
        self.num_texts = 0

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        self.num_texts += len(texts)
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Vectors:
        tokens = ["[", *text, "]"]
        vectors = np.stack([np.random.default_rng(ord(c)).normal(size=32) for c in tokens]).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        is_mark = np.array([True, *[False] * len(text), True])
        return Vectors(tuple(map(ord, tokens)), vectors, is_mark, sum(c not in KNOWN for c in text) / max(1, len(text)))

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def judged(*pairs: Pair, comparison: Comparison = "reference", threshold: float = 0.8) -> list[Judged]:
    return list(judge_pairs(pairs, Letters(), comparison, threshold))


def test_what_is_below_the_threshold_has_a_finding_with_the_number() -> None:
    good, bad = judged(Pair(4, "整机三年", "整机三年"), Pair(9, "多久", "整机三年"))
    assert (good.row, good.finding) == (4, None)
    assert good.f1 == pytest.approx(1, abs=1e-6)
    assert bad.row == 9
    assert bad.finding == Finding(
        "quality.reference",
        "response",
        f"BERTScore F1 {bad.f1:.3f} of the answer against the row's reference is below 0.8",
    )


@pytest.mark.parametrize(
    ("comparison", "field", "words"),
    [
        ("reference", "response", "the answer against the row's reference"),
        ("augmented", "prompt", "the text against the one it was made from"),
        ("relevance", "response", "the answer against its question, which measures a common subject and not quality"),
    ],
)
def test_each_comparison_says_what_it_is(comparison: Comparison, field: str, words: str) -> None:
    (one,) = judged(Pair(0, "多久", "整机三年"), comparison=comparison)
    assert one.finding is not None
    assert (one.finding.rule, one.finding.field) == (f"quality.{comparison}", field)
    assert words in one.finding.reason


def test_a_made_answer_is_named_as_what_it_is() -> None:
    (one,) = judged(Pair(0, "多久", "整机三年", "response"), comparison="augmented")
    assert one.finding is not None
    assert one.finding.field == "response"


def test_a_score_at_the_threshold_passes() -> None:
    pair = Pair(0, "整机", "整机三年")
    (score,) = bert_scores([("整机", "整机三年")], Letters())
    assert judged(pair, threshold=score.f1)[0].finding is None
    (below,) = judged(pair, threshold=score.f1 + 1e-9)
    assert below.finding is not None


def test_a_score_that_rounds_to_the_threshold_is_printed_below_it() -> None:
    assert quality._below(0.79962, 0.8) == "0.799620"
    assert quality._below(0.7, 0.8) == "0.700"


def test_an_empty_answer_is_like_nothing() -> None:
    (one,) = judged(Pair(0, "", "整机三年"), threshold=0.1)
    assert one.f1 == 0
    assert one.finding is not None


def test_unknown_tokens_are_named_where_they_are_many() -> None:
    known, unknown = judged(Pair(0, "多久", "三年"), Pair(1, "退货麻烦", "三年"), threshold=1)
    assert known.finding is not None
    assert unknown.finding is not None
    assert "does not know" not in known.finding.reason
    assert unknown.unknown == 1
    assert unknown.finding.reason.endswith("; the encoder does not know 100% of the tokens")


def test_a_note_says_when_the_encoder_reads_another_language() -> None:
    some = Familiarity()
    assert some.note("minilm") is None
    some.add(Judged(0, 0.5, None, 0.2))
    assert some.note("minilm") is None
    some.add(Judged(1, 0.5, None, 0.9))
    note = some.note("minilm")
    assert note is not None
    assert note.startswith("the encoder minilm does not know 55% of the tokens of 2 compared pairs")
    assert "quality.encoder" in note


def test_order_and_scores_are_those_of_single_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_WINDOW", 7)
    pairs = [Pair(i, KNOWN[: 1 + i * 5 % 9], KNOWN[: 1 + i % 9]) for i in range(40)]
    found = judged(*pairs)
    assert [one.row for one in found] == list(range(40))
    for pair, one in zip(pairs, found, strict=True):
        assert one == judged(pair)[0]


def test_nothing_is_encoded_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_WINDOW", 4)
    encoder = Letters()
    stream = judge_pairs((Pair(i, "整机", "整机") for i in range(1000)), encoder, "reference", 0.5)
    assert encoder.num_texts == 0
    next(stream)
    assert encoder.num_texts == 8


class Large:
    """Every text has vectors of 100 kB."""

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        return [Vectors((1,) * 100, np.full((100, 256), 1 / 16, np.float32), np.zeros(100, bool)) for _ in texts]

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def test_memory_does_not_grow_with_the_rows() -> None:
    """Texts of 5 kB beside 100 kB of vectors: at most a window of the first, 32 pairs of the second."""
    pairs: Iterator[Pair] = (Pair(i, f"{i}" + "a" * 5000, "b") for i in range(3000))
    tracemalloc.start()
    for one in judge_pairs(pairs, Large(), "reference", 0.5):
        assert one.f1 > 0.9
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1024 * 6_000 + 2 * 64 * 110_000 + 2_000_000  # all pairs: 15 MB of texts, 600 MB of vectors
