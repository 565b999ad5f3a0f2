"""BERTScore's arithmetic on small vectors, against the definition spelt out; no network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia import similarity
from pingjia.similarity import Idf, Score, Vectors, bert_score, bert_scores, encode_pairs

CLS, SEP = 101, 102


def text(ids: Sequence[int], seed: int = 0, *, marks: bool = True) -> Vectors:
    """A text whose equal tokens have equal vectors."""
    whole = [CLS, *ids, SEP] if marks else list(ids)
    vectors = np.stack([np.random.default_rng([seed, i]).normal(size=8) for i in whole]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Vectors(tuple(whole), vectors, np.array([i in (CLS, SEP) for i in whole]))


def spelt_out(candidate: Vectors, reference: Vectors, weight: dict[int, float]) -> tuple[float, float, float]:
    """The definition of the paper, pair by pair; marks are matched with but not counted."""

    def side(these: Vectors, those: Vectors) -> float:
        best = [max(float(np.dot(a, b)) for b in those.vectors) for a in these.vectors]
        weights = [0 if i in (CLS, SEP) else weight[i] for i in these.ids]
        return sum(w * b for w, b in zip(weights, best, strict=True)) / sum(weights)

    p, r = side(candidate, reference), side(reference, candidate)
    return p, r, 2 * p * r / (p + r)


tokens = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(tokens, tokens)
def test_as_the_paper_defines_it(left: list[int], right: list[int]) -> None:
    found = bert_score(text(left), text(right))
    precision, recall, f1 = spelt_out(text(left), text(right), dict.fromkeys(range(31), 1.0))
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=1e-5)
    assert found.f1 == pytest.approx(f1, abs=1e-5, rel=1e-3)  # huge where precision and recall cancel


@given(tokens, tokens, st.lists(tokens, min_size=1, max_size=4))
def test_with_weights(left: list[int], right: list[int], others: list[list[int]]) -> None:
    references = [text(right), *map(text, others)]
    idf = Idf.of(references)
    weight = {i: math.log((len(references) + 1) / (sum(i in r.ids for r in references) + 1)) for i in {*left, *right}}
    found = bert_score(text(left), text(right), idf)
    if not any(weight[i] for i in left):
        assert found.precision == found.f1 == 0
    elif any(weight[i] for i in right):
        expected = spelt_out(text(left), text(right), weight)
        assert (found.precision, found.recall, found.f1) == pytest.approx(expected, abs=1e-4)


def test_a_token_in_every_reference_weighs_nothing_and_one_in_none_the_most() -> None:
    idf = Idf.of([text([1, 2]), text([1, 3])])
    assert idf.of_tokens([1, 2, 9, CLS]).tolist() == pytest.approx([0, math.log(3 / 2), math.log(3), 0])


@given(tokens)
def test_a_text_is_wholly_in_itself(ids: list[int]) -> None:
    assert bert_score(text(ids), text(ids)).f1 == pytest.approx(1, abs=1e-6)


@given(tokens, tokens)
def test_turned_round_precision_is_recall(left: list[int], right: list[int]) -> None:
    there, back = bert_score(text(left), text(right)), bert_score(text(right), text(left))
    assert (there.precision, there.recall) == pytest.approx((back.recall, back.precision), abs=1e-6)
    assert there.f1 == pytest.approx(back.f1, abs=1e-6)


def test_a_part_of_a_text_is_precise_and_misses_the_rest() -> None:
    score = bert_score(text([1, 2, 3]), text([1, 2, 3, 4, 5, 6]))
    assert score.precision == pytest.approx(1, abs=1e-6)
    assert score.recall < 0.9


def test_a_text_without_tokens_is_like_nothing() -> None:
    assert bert_score(text([]), text([1])) == bert_score(text([1]), text([])) == Score(0.0, 0.0, 0.0)
    assert bert_score(text([]), text([])) == Score(0.0, 0.0, 0.0)


def test_rescaling_moves_the_baseline_to_zero_and_leaves_one() -> None:
    baseline = Score(0.5, 0.6, 0.8)
    assert baseline.rescaled(baseline) == Score(0.0, 0.0, 0.0)
    assert Score(1.0, 1.0, 1.0).rescaled(baseline) == Score(1.0, 1.0, 1.0)
    found = Score(0.75, 0.7, 0.7).rescaled(baseline)
    assert (found.precision, found.recall, found.f1) == pytest.approx((0.5, 0.25, -0.5))


class Counting:
    """An encoder of characters that remembers what it was given at once."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        self.calls.append(list(texts))
        return [text([ord(c) for c in t]) for t in texts]

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


@given(st.lists(st.tuples(st.text("abc", max_size=9), st.text("abc", max_size=9)), max_size=80))
def test_every_pair_is_scored_once_and_in_order(pairs: list[tuple[str, str]]) -> None:
    encoder = Counting()
    scores = bert_scores(pairs, encoder)
    assert len(scores) == len(pairs)
    for (left, right), score in zip(pairs, scores, strict=True):
        assert score == bert_score(text(list(map(ord, left))), text(list(map(ord, right))))
    assert all(len(call) <= 2 * similarity._AT_ONCE for call in encoder.calls)


def test_pairs_of_like_length_are_encoded_together() -> None:
    encoder = Counting()
    pairs = [("a" * (1 + 7 * i % 100), "b") for i in range(100)]
    found = [i for i, _, _ in encode_pairs(pairs, encoder)]
    lengths = [len(pairs[i][0]) for i in found]
    assert sorted(found) == list(range(100))
    assert lengths == sorted(lengths)
