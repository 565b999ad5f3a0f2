"""ROUGE-1/2/L and BLEU-4 over tokens, and the table of everything an answer can be scored by. Scores are 0 to 1.

Facts (`facts.py`) and forms (`forms.py`) have their own files: they compare characters, not tokens. BERTScore's
arithmetic is the base's (`similarity.py`); its encoder is brought by the caller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from pingjia.evaluate import forms
from pingjia.evaluate.facts import missing_facts
from pingjia.evaluate.tokens import tokenise
from pingjia.similarity import TextEncoder, bert_scores

Tokens = Sequence[str]


@dataclass(frozen=True)
class Pair:
    """An answer beside what was expected; tokens and missing facts are computed once, when a metric asks for them."""

    answer: str
    expected: str
    facts: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> tuple[list[str], list[str]]:
        return tokenise(self.answer), tokenise(self.expected)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        return missing_facts(self.answer, self.facts)


def rouge_n(answer: Tokens, expected: Tokens, n: int) -> float:
    """F-measure of common n-grams, each counted as often as both sides have it (Lin, 2004).

    Equals rouge-chinese with `exclusive=False`; its default compares sets, which forgives repetition.
    """
    ours, theirs = _ngrams(answer, n), _ngrams(expected, n)
    return _f_measure((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: Tokens, expected: Tokens) -> float:
    """F-measure of the longest common subsequence of the whole texts. Equals rouge-chinese."""
    return _f_measure(lcs_length(answer, expected), len(answer), len(expected))


def lcs_length(left: Tokens, right: Tokens) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-vector recurrence (2004).

    One addition and one subtraction of a len(right)-bit integer per token of `left`: O(n*m/64) time, O(n+m) memory.
    """
    where: dict[str, int] = {}
    for i, token in enumerate(right):
        where[token] = where.get(token, 0) | 1 << i
    whole = (1 << len(right)) - 1
    row = whole  # bit i is 0 where the common subsequence grows at right[i]
    for token in left:
        hits = row & where.get(token, 0)
        row = ((row + hits) | (row - hits)) & whole
    return len(right) - row.bit_count()


def bleu_4(answer: Tokens, expected: Tokens) -> float:
    """Sentence BLEU of order 4 with one reference, brevity penalty, smoothing "exp", effective order.

    "exp" is the NIST smoothing: the k-th precision without a match counts as 1/2^k of a match. Effective order leaves
    out orders longer than the answer. Equals sacrebleu's `sentence_bleu` on the same tokens (which says 0 to 100).
    """
    logs: list[float] = []
    misses = 0
    for n in range(1, min(4, len(answer)) + 1):
        ours = _ngrams(answer, n)
        matches = (ours & _ngrams(expected, n)).total()
        if n == 1 and not matches:
            return 0.0
        misses += not matches
        logs.append(math.log((matches or 0.5**misses) / ours.total()))
    if not logs:
        return 0.0
    brevity = min(0.0, 1 - len(expected) / len(answer))
    return math.exp(brevity + sum(logs) / len(logs))


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _f_measure(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _text(measure: Callable[[Tokens, Tokens], float]) -> Callable[[Pair], float | None]:
    """A measure of texts as a scorer; it does not apply where no text is expected (a question with facts alone)."""
    return lambda pair: measure(*pair.tokens) if pair.tokens[1] else None


def _form(measure: Callable[[str, str], float | None]) -> Callable[[Pair], float | None]:
    return lambda pair: measure(pair.answer, pair.expected)


def _exact_facts(pair: Pair) -> float | None:
    return float(not pair.missing) if pair.facts else None


def _fact_share(pair: Pair) -> float | None:
    return 1 - len(pair.missing) / len(pair.facts) if pair.facts else None


SCORERS: dict[str, Callable[[Pair], float | None]] = {
    "rouge_1": _text(partial(rouge_n, n=1)),
    "rouge_2": _text(partial(rouge_n, n=2)),
    "rouge_l": _text(rouge_l),
    "bleu_4": _text(bleu_4),
    "exact_facts": _exact_facts,
    "fact_share": _fact_share,
    "language_match": _form(forms.language_match),
    "refusal_match": _form(forms.refusal_match),
    "json_valid": _form(forms.json_valid),
    "json_equal": _form(forms.json_equal),
}
# Not among SCORERS: these look at no answer alone, but ask an encoder, or the model itself, about many at once.
BERT_SCORE = "bert_score"
TOKEN_PROBABILITY = "token_probability"  # noqa: S105  not a password


def score(pair: Pair, metrics: Sequence[str]) -> dict[str, float]:
    """The scores of one answer by SCORERS. A metric that does not apply (no facts, no text) is left out."""
    found = ((name, SCORERS[name](pair)) for name in metrics if name in SCORERS)
    return {name: value for name, value in found if value is not None}


def score_all(pairs: Sequence[Pair], metrics: Sequence[str], encoder: TextEncoder | None) -> list[dict[str, float]]:
    """The scores of every answer. `encoder` is needed where BERT_SCORE is among the metrics, and not used elsewhere."""
    scores = [score(pair, metrics) for pair in pairs]
    if BERT_SCORE in metrics:
        assert encoder is not None
        texts = [i for i, pair in enumerate(pairs) if pair.expected.strip()]
        found = bert_scores([(pairs[i].answer, pairs[i].expected) for i in texts], encoder)
        for i, bert in zip(texts, found, strict=True):
            scores[i][BERT_SCORE] = min(1.0, max(0.0, bert.f1))  # cosines may be negative, and 1.0000001
    return scores
