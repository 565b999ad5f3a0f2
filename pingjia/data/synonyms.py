"""Rewording a question by synonyms: a maker of rows for `augment.py`.

Chinese is cut by jieba, English by spaces. The bundled lists hold only words that may stand for each other in most
sentences, with what must follow where that decides. A replacement that jieba would read differently in its place is
not made. Not here: what must not change (`spans.py`).
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pingjia.data.augment import Refusal, Task
from pingjia.data.spans import Span, breach, protected_spans, tagged
from pingjia.errors import UserError
from pingjia.script import count_han

_BUNDLED = tuple(Path(__file__).with_name(f"synonyms_{lang}.tsv") for lang in ("zh", "en"))
_MAX_TOKENS = 4  # of one Chinese phrase in the list
_TRIES = 12  # draws per copy before a row is given up
_AUXILIARIES = frozenset(
    ("会", "能", "是", "有", "可能", "要", "没", "没有", "还", "需要", "应该", "想", "觉得", "得", "让", "算")
)
_CLAUSE_END = re.compile(r"[，。？！；,.?!;\s]|\Z")
_VOWEL = re.compile("[aeiou]", re.IGNORECASE)
_ARTICLE = re.compile(r"\ban?\s+\Z", re.IGNORECASE)
_NEGATION_NEXT = re.compile(r"\s+(?:not|no|never|nothing|nobody|none)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rule:
    """What may stand for a word, and what must follow it: see the head of the bundled lists. "": anything."""

    targets: tuple[str, ...]
    follows: str = ""


Thesaurus = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """text[start:end] may become any of `choices`."""

    start: int
    end: int
    choices: tuple[str, ...]


class Synonyms:
    """Replaces `share` of the words that have synonyms, at least one.

    Deterministic by a task's key and copy. `thesaurus`: a file of your own, used besides the bundled ones; its columns
    are theirs. Raises UserError for a file that cannot be read.
    """

    def __init__(self, share: float = 0.2, thesaurus: str | Path | None = None) -> None:
        self._share = share
        self._words = load_thesaurus(*_BUNDLED, *([Path(thesaurus)] if thesaurus else []))
        self._english = _english_pattern(self._words)

    def make(self, tasks: Sequence[Task]) -> list[str | Refusal]:
        return [self._one(task) for task in tasks]

    def _one(self, task: Task) -> str | Refusal:
        spans = protected_spans(task.text, task.facts)
        slots = self._slots(task.text, spans)
        if not slots:
            return Refusal("no_synonym", "no word of the thesaurus can be replaced in it")
        variants = self._variants(task, spans, slots)
        variant = next(itertools.islice(variants, task.copy - 1, None), None)
        return variant or Refusal("no_variant", f"the thesaurus gives fewer than {task.copy} wordings of it")

    def _variants(self, task: Task, spans: Sequence[Span], slots: Sequence[_Slot]) -> Iterator[str]:
        """Different wordings, endless tries but at most _TRIES in a row that bring nothing new."""
        rng = random.Random(task.key)  # noqa: S311  no secret
        num = max(1, round(self._share * len(slots)))
        seen, misses = {task.text}, 0
        while misses < _TRIES:
            picked = sorted(rng.sample(slots, num), key=lambda s: s.start)
            variant = _filled(task.text, [(slot, rng.choice(slot.choices)) for slot in picked])
            if variant in seen or breach(task.text, spans, variant):
                misses += 1
                continue
            misses = 0
            seen.add(variant)
            yield variant

    def _slots(self, text: str, spans: Sequence[Span]) -> list[_Slot]:
        found = self._chinese_slots(text) if count_han(text) else self._english_slots(text)
        free = (s for s in found if not any(s.start < p.end and p.start < s.end for p in spans))
        return [slot for slot in free if slot.choices]

    def _chinese_slots(self, text: str) -> Iterator[_Slot]:
        tokens = tagged(text)
        starts = [0, *itertools.accumulate(len(word) for word, _ in tokens)]
        i = 0
        while i < len(tokens):
            num = self._phrase_at(tokens, i)
            if num:
                choices = self._choices(text, tokens, i, i + num)
                yield _Slot(starts[i], starts[i + num], choices)
            i += num or 1

    def _phrase_at(self, tokens: Sequence[tuple[str, str]], i: int) -> int:
        """Number of tokens from `i` on that are the longest known phrase; 0 for none."""
        lengths = range(min(_MAX_TOKENS, len(tokens) - i), 0, -1)
        return next((n for n in lengths if "".join(w for w, _ in tokens[i : i + n]) in self._words), 0)

    def _choices(self, text: str, tokens: Sequence[tuple[str, str]], i: int, j: int) -> tuple[str, ...]:
        word = "".join(w for w, _ in tokens[i:j])
        targets = [t for rule in self._words[word] if _follows(tokens[j:], rule.follows) for t in rule.targets]
        before, after = [w for w, _ in tokens[:i]], [w for w, _ in tokens[j:]]
        return tuple(t for t in dict.fromkeys(targets) if t not in text and _reads_well(before, t, after))

    def _english_slots(self, text: str) -> Iterator[_Slot]:
        for match in self._english.finditer(text):
            if (match[0].isupper() and len(match[0]) > 1) or _NEGATION_NEXT.match(text, match.end()):
                continue
            targets = [t for rule in self._words[_plain(match[0])] for t in rule.targets]
            fitting = (t for t in targets if _keeps_article(text[: match.start()], match[0], t))
            yield _Slot(*match.span(), tuple(_in_case(t, match[0]) for t in dict.fromkeys(fitting)))


def _filled(text: str, picked: Sequence[tuple[_Slot, str]]) -> str:
    parts, at = [], 0
    for slot, choice in picked:
        parts += [text[at : slot.start], choice]
        at = slot.end
    return "".join([*parts, text[at:]])


def _follows(rest: Sequence[tuple[str, str]], follows: str) -> bool:
    if not follows or not rest:
        return not follows
    word, tag = rest[0]
    return tag[0] in follows or ("V" in follows and tag[0] == "v" and word not in _AUXILIARIES and not _is_past(rest))


def _is_past(rest: Sequence[tuple[str, str]]) -> bool:
    text = "".join(word for word, _ in rest)
    end = _CLAUSE_END.search(text)
    return end is not None and text[: end.start()].endswith(("了", "了呢", "了啊", "了呀", "了吗"))


def _reads_well(before: Sequence[str], target: str, after: Sequence[str]) -> bool:
    """Whether jieba cuts the new clause at the same places, so that no other word arises at the seams."""
    left, right = _clause(before[::-1])[::-1], _clause(after)
    cut = [word for word, _ in tagged("".join([*left, target, *right]))]
    return cut == [*left, *(word for word, _ in tagged(target)), *right]


def _clause(words: Sequence[str]) -> list[str]:
    """The words up to the first that is not Chinese; jieba reads each stretch of Chinese by itself."""
    return list(itertools.takewhile(count_han, words))


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().replace("’", "'").split())


def _keeps_article(before: str, old: str, new: str) -> bool:
    """a/an in front must still be right."""
    return not _ARTICLE.search(before) or bool(_VOWEL.match(old)) == bool(_VOWEL.match(new))


def _in_case(target: str, old: str) -> str:
    target = re.sub(r"\bi\b", "I", target)
    return target[0].upper() + target[1:] if old[0].isupper() else target


# ---- the lists


def load_thesaurus(*files: Path) -> Thesaurus:
    """Words -> what may stand for them, of all files together. Raises UserError naming file and line."""
    return _load(tuple(files))


@functools.lru_cache(maxsize=4)
def _load(files: tuple[Path, ...]) -> Thesaurus:
    rules: dict[str, tuple[Rule, ...]] = {}
    for file in files:
        for word, rule in _rules(file):
            rules[word] = (*rules.get(word, ()), rule)
    return rules


def _rules(file: Path) -> Iterator[tuple[str, Rule]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: no thesaurus that can be read ({e}); it must be a UTF-8 text file") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            yield from _line_rules(line, f"{file}:{number}")


def _line_rules(line: str, where: str) -> Iterator[tuple[str, Rule]]:
    words, targets, follows = (column.strip() for column in [*line.split("\t"), "", ""][:3])
    group = [_plain(w) for w in words.split(",") if w.strip()]
    others = [_plain(t) for t in targets.split(",") if t.strip()]
    if len(group) + len(others) < 2 or not group:
        raise UserError(f"{where}: {line!r}: needs two words, separated by a comma, or a word, a tab and its synonyms")
    for short in (w for w in (*group, *others) if len(w) < 2):
        raise UserError(
            f"{where}: {short!r}: words of one character are not replaced: they are part of too many others"
        )
    for word in group:
        yield word, Rule(tuple(o for o in others or group if o != word), follows)


def _english_pattern(words: Thesaurus) -> re.Pattern[str]:
    phrases = sorted((w for w in words if not count_han(w)), key=len, reverse=True)
    forms = "|".join(re.escape(p).replace("\\ ", r"\s+").replace("'", "['’]") for p in phrases)
    return re.compile(rf"(?<![\w'’-])(?:{forms})(?![\w'’-])", re.IGNORECASE)
