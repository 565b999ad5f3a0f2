"""How alike two texts are, from the vectors of their tokens: BERTScore's arithmetic. Knows no network and no file.

Vectors come from an encoder (`models/encoder.py`), which the caller brings: data preparation and evaluation both
compare with it and neither imports torch.

Shapes: T tokens, H numbers per vector, N texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

import numpy as np

_AT_ONCE = 32  # pairs whose vectors are held together: 50 MB at 512 tokens of 384 numbers


@dataclass(frozen=True, slots=True)
class Vectors:
    """One text: its tokens with the encoder's marks ([CLS], [SEP]) around them, vectors [T, H] of unit length.

    `is_mark` [T]: marks are compared with, but weigh nothing. `unknown`: the share of the other tokens that the encoder
    has no entry for ([UNK]); they all look alike to it.
    """

    ids: tuple[int, ...]
    vectors: np.ndarray
    is_mark: np.ndarray
    unknown: float = 0.0


class TextEncoder(Protocol):
    """Texts -> vectors."""

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        """One entry per text, in order."""
        ...

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, H], unit length: one vector per text."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """BERTScore: how much of the candidate is in the reference, how much of the reference in the candidate, and F1."""

    precision: float
    recall: float
    f1: float

    def rescaled(self, baseline: Score) -> Score:
        """Stretched so that `baseline`, what unrelated texts score, becomes 0; 1 stays 1."""
        return Score(
            _stretch(self.precision, baseline.precision),
            _stretch(self.recall, baseline.recall),
            _stretch(self.f1, baseline.f1),
        )


def _stretch(value: float, zero: float) -> float:
    return (value - zero) / (1 - zero)


def bert_score(candidate: Vectors, reference: Vectors, idf: Idf | None = None) -> Score:
    """Greedy matching of token vectors by cosine (arXiv:1904.09675); equal to the package bert-score to 1e-5.

    Without `idf` every token but the marks weighs 1. A text without tokens scores 0 against any other, and so does one
    whose tokens all weigh 0.
    """
    if candidate.is_mark.all() or reference.is_mark.all():
        return Score(0.0, 0.0, 0.0)
    cosine = candidate.vectors @ reference.vectors.T
    precision = _mean(cosine.max(axis=1), _weights(candidate, idf))
    recall = _mean(cosine.max(axis=0), _weights(reference, idf))
    total = precision + recall
    return Score(precision, recall, 2 * precision * recall / total if total else 0.0)


def _weights(text: Vectors, idf: Idf | None) -> np.ndarray:
    weights = np.ones(len(text.ids), np.float32) if idf is None else idf.of_tokens(text.ids)
    return np.where(text.is_mark, np.float32(0), weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float(values @ weights) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Idf:
    """How much a token tells: log((N + 1) / (n + 1)) for one that is in n of N references, `unseen` for one in none."""

    weights: Mapping[int, float]
    unseen: float

    @classmethod
    def of(cls, references: Sequence[Vectors]) -> Idf:
        num_texts = len(references)
        counts = Counter(token for text in references for token in set(text.ids))
        return cls({token: log((num_texts + 1) / (n + 1)) for token, n in counts.items()}, log(num_texts + 1))

    def of_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T]."""
        return np.array([self.weights.get(token, self.unseen) for token in ids], np.float32)


def encode_pairs(pairs: Sequence[tuple[str, str]], encoder: TextEncoder) -> Iterator[tuple[int, Vectors, Vectors]]:
    """(index, candidate, reference) of every pair once, pairs of like length together and so not in order.

    Padding costs time, and only the vectors of _AT_ONCE pairs are held.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        vectors = encoder.token_vectors([text for side in (0, 1) for text in (pairs[i][side] for i in some)])
        yield from zip(some, vectors[: len(some)], vectors[len(some) :], strict=True)


def bert_scores(pairs: Sequence[tuple[str, str]], encoder: TextEncoder) -> list[Score]:
    """BERTScore of every (candidate, reference), in order, without idf: every token weighs the same."""
    scores = {i: bert_score(candidate, reference) for i, candidate, reference in encode_pairs(pairs, encoder)}
    return [scores[i] for i in range(len(pairs))]
