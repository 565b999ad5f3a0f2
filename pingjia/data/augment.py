"""Rows that are made from rows: which are chosen, what is refused, and what a made row says of its origin.

Only the last question of a row changes; history, answer and facts stay. How a question is reworded is a `Maker`
(`synonyms.py`, `back_translation.py`). Not here: BERTScore and the held-out rows, which are handed in.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from typing import Protocol

from pingjia.data.settings import AugmentSettings
from pingjia.types import Example

BATCH = 64  # questions that a maker gets at once: enough to keep a model or an endpoint busy
MAX_CHARS = 4000  # of a question; a longer one is a document, and costs seconds to cut into words

# Where the words themselves are asked about, other words make the answer wrong.
_ABOUT_WORDS = re.compile(
    "[近同反]义词|造句|拼音|笔画|部首|偏旁|读音|发音|怎么读|怎么念|错别字|病句|词性|押韵|翻译|英[文语]怎么说|用英[文语]|多少个字|几个字|组词|续写|仿写"
    r"|\b(?:synonyms?|antonyms?|rhymes?|spell(?:ing)?|pronounce|translat\w+|grammar|grammatical|rewrite|rephrase|paraphrase)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Task:
    """A question to reword. `key` seeds every choice; `copy` counts from 1, and each copy is worded differently."""

    text: str
    facts: tuple[str, ...]
    key: str
    copy: int = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a question was not reworded. `rule` is a stable short name, `reason` a sentence."""

    rule: str
    reason: str


class Maker(Protocol):
    """Rewords questions: the new wording of each, in order, or why there is none. Protected spans must survive."""

    def make(self, tasks: Sequence[Task]) -> Sequence[str | Refusal]: ...


@dataclass(frozen=True, slots=True)
class Filters:
    """What a made row must pass. `similarity(pairs)` scores (new, original) questions, as BERTScore F1 does."""

    is_held_out: Callable[[str], bool] | None = None
    similarity: Callable[[Sequence[tuple[str, str]]], Sequence[float]] | None = None
    min_similarity: float | None = None


@dataclass(slots=True)
class AugmentCounts:
    """What came of it, by maker. asked = made + all refused; `reasons` keeps the first sentence of each rule."""

    asked: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def refuse(self, maker: str, refusal: Refusal) -> None:
        self.refused.setdefault(maker, Counter())[refusal.rule] += 1
        self.reasons.setdefault(refusal.rule, refusal.reason)


def augment(
    examples: Iterable[Example],
    settings: AugmentSettings,
    makers: Mapping[str, Maker],
    seed: int,
    *,
    filters: Filters = Filters(),
    counts: AugmentCounts | None = None,
) -> Iterator[Example]:
    """Yield the made rows, in the order of their originals; the originals are not repeated.

    `makers` are called by the names of `settings`' sections ("synonyms", "back_translation"); one with a ratio above 0
    must be there. Memory: one batch, and a normalised copy of each question that was seen or made.
    """
    maker_run = _Run(makers, filters, counts if counts is not None else AugmentCounts())
    chosen = _chosen(examples, settings, seed, maker_run.seen)
    while batch := list(itertools.islice(chosen, BATCH)):
        yield from maker_run.make(batch)


# ---- which rows


@dataclass(frozen=True, slots=True)
class _Wanted:
    example: Example
    maker: str
    task: Task


def _chosen(examples: Iterable[Example], settings: AugmentSettings, seed: int, seen: set[str]) -> Iterator[_Wanted]:
    ratios = {name: getattr(settings, name).ratio for name in ("synonyms", "back_translation")}
    quotas = {name: Quota(ratio, seed, name) for name, ratio in ratios.items() if ratio > 0}
    for example in examples:
        text = question(example)
        seen.add(normal(text))
        if settings.domains is not None and example.domain not in settings.domains:
            continue
        for name, quota in quotas.items():
            key = f"{seed}|{name}|{example.where}"
            for copy in range(1, quota.next() + 1):
                yield _Wanted(example, name, Task(text, example.facts, key, copy))


class Quota:
    """How many copies each row in turn gets, so that n rows together get n * ratio, give or take one.

    0.5 is every second row, 2 is two of each. The seed says where the counting starts.
    """

    def __init__(self, ratio: float, seed: int, name: str) -> None:
        self._ratio = Fraction(str(ratio))  # exact: 0.1 ten times is 1
        self._total = Fraction(random.Random(f"{seed}|{name}").randrange(1000), 1000)  # noqa: S311

    def next(self) -> int:
        before = floor(self._total)
        self._total += self._ratio
        return floor(self._total) - before


def _question_at(example: Example) -> int:
    return max(i for i, message in enumerate(example.messages) if message.role == "user")


def question(example: Example) -> str:
    """The last question of a row, the part that a made row words differently."""
    return example.messages[_question_at(example)].content


def _unsuitable(text: str) -> Refusal | None:
    if len(text) > MAX_CHARS:
        return Refusal("too_long", f"{len(text)} characters; up to {MAX_CHARS} are reworded")
    match = _ABOUT_WORDS.search(text)
    return Refusal("about_words", f"asks about words ({match[0]})") if match else None


# ---- what becomes of them


class _Run:
    def __init__(self, makers: Mapping[str, Maker], filters: Filters, counts: AugmentCounts) -> None:
        self.seen: set[str] = set()  # normalised questions, of rows and of made rows
        self._makers = makers
        self._filters = filters
        self._counts = counts

    def make(self, batch: Sequence[_Wanted]) -> list[Example]:
        made: list[tuple[int, _Wanted, str]] = []
        for name in dict.fromkeys(w.maker for w in batch):
            mine = [(i, w) for i, w in enumerate(batch) if w.maker == name]
            texts = self._worded(name, [w for _, w in mine])
            made += [(i, w, text) for (i, w), text in zip(mine, texts, strict=True) if text is not None]
        made = self._similar_enough(sorted(made, key=lambda m: m[0]))
        return [self._example(wanted, text) for _, wanted, text in made if self._is_new(wanted, text)]

    def _worded(self, name: str, wanted: Sequence[_Wanted]) -> list[str | None]:
        """The maker's wordings; None where it was refused, and counted."""
        self._counts.asked[name] += len(wanted)
        refusals = [_unsuitable(w.task.text) for w in wanted]
        asked = [w.task for w, refusal in zip(wanted, refusals, strict=True) if refusal is None]
        answers = iter(self._makers[name].make(asked) if asked else ())
        outcomes = [refusal or next(answers) for refusal in refusals]
        return [self._checked(w, outcome) for w, outcome in zip(wanted, outcomes, strict=True)]

    def _checked(self, wanted: _Wanted, outcome: str | Refusal) -> str | None:
        if isinstance(outcome, str):
            outcome = self._fault(wanted, outcome) or outcome
        if isinstance(outcome, Refusal):
            self._counts.refuse(wanted.maker, outcome)
            return None
        return outcome

    def _fault(self, wanted: _Wanted, text: str) -> Refusal | None:
        if normal(text) == normal(wanted.task.text):
            return Refusal("unchanged", "the new wording is the old one")
        if self._filters.is_held_out is not None and self._filters.is_held_out(text):
            return Refusal("held_out", "the new wording is, or is nearly, a held-out question")
        return None

    def _similar_enough(self, made: list[tuple[int, _Wanted, str]]) -> list[tuple[int, _Wanted, str]]:
        similarity, threshold = self._filters.similarity, self._filters.min_similarity
        if similarity is None or threshold is None or not made:
            return made
        scores = similarity([(text, wanted.task.text) for _, wanted, text in made])
        for (_, wanted, _), score in zip(made, scores, strict=True):
            if score < threshold:
                reason = f"similarity {score:.3f} to the original, below {threshold:g}"
                self._counts.refuse(wanted.maker, Refusal("quality", reason))
        return [one for one, score in zip(made, scores, strict=True) if score >= threshold]

    def _is_new(self, wanted: _Wanted, text: str) -> bool:
        key = normal(text)
        if key in self.seen:
            self._counts.refuse(wanted.maker, Refusal("duplicate", "another row asks exactly this"))
            return False
        self.seen.add(key)
        return True

    def _example(self, wanted: _Wanted, text: str) -> Example:
        self._counts.made[wanted.maker] += 1
        example, at = wanted.example, _question_at(wanted.example)
        messages = [*example.messages]
        messages[at] = replace(messages[at], content=text)
        return replace(
            example,
            messages=tuple(messages),
            where=f"{example.where}~{wanted.maker}{wanted.task.copy}",
            source=wanted.maker,
            augmented_from=example.where,
        )


def normal(text: str) -> str:
    """A question without what does not change it: width, case, spaces, punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
