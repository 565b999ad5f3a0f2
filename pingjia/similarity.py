"""How alike two texts are, from the vectors of their tokens: BERTScore's arithmetic. Knows no network and no file.

Vectors come from an encoder (`models/encoder.py`), which the caller brings: data preparation and evaluation both
compare with it and neither imports torch.

Shapes: T tokens, H numbers per vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Vectors:
    """One text: its tokens with the encoder's marks ([CLS], [SEP]) around them, vectors [T, H] of unit length.

    Marks are compared with, but weigh nothing.
    """

    ids: tuple[int, ...]
    vectors: np.ndarray
    is_mark: np.ndarray


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


def bert_score(candidate: Vectors, reference: Vectors, idf: Mapping[int, float] | None = None) -> Score:
    """Greedy matching of token vectors by cosine (arXiv:1904.09675); equal to the package bert-score to 1e-5.

    Without `idf` every token but the marks weighs 1. A text without tokens scores 0 against any other.
    """
    if _is_empty(candidate) or _is_empty(reference):
        return Score(0.0, 0.0, 0.0)
    cosine = candidate.vectors @ reference.vectors.T
    precision = _mean(cosine.max(axis=1), _weights(candidate, idf))
    recall = _mean(cosine.max(axis=0), _weights(reference, idf))
    total = precision + recall
    return Score(precision, recall, 2 * precision * recall / total if total else 0.0)


def _is_empty(text: Vectors) -> bool:
    return bool(text.is_mark.all())


def _weights(text: Vectors, idf: Mapping[int, float] | None) -> np.ndarray:
    weights = np.array([1.0 if idf is None else idf.get(i, 0.0) for i in text.ids], np.float32)
    return np.where(text.is_mark, np.float32(0), weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float((values * weights).sum() / total) if total else 0.0


class Idf(dict[int, float]):
    """Weights of tokens from the texts that are compared against; a token that is in none of them weighs the most."""

    def __init__(self, references: Sequence[Vectors]) -> None:
        counts: dict[int, int] = {}
        for text in references:
            for token in set(text.ids):
                counts[token] = counts.get(token, 0) + 1
        self._unseen = log(len(references) + 1)
        super().__init__({token: log((len(references) + 1) / (count + 1)) for token, count in counts.items()})

    def get(self, key: int, default: float = 0.0) -> float:  # type: ignore[override]
        return super().get(key, self._unseen)
