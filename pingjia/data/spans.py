"""What must not change when a text is reworded: numbers, negations, names, codes, addresses, placeholders, facts.

Found by form, and for Chinese names by jieba's tags; when in doubt a piece is protected. Not here: rewording.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pingjia.data.span_forms import by_form
from pingjia.script import count_han

KINDS = (
    "code", "url", "email", "placeholder", "quoted", "path", "formula", "sku", "number", "negation", "emoji", "name",
    "fact", "material",
)  # fmt: skip
_MATERIAL = re.compile(r"(?:：|:(?=\s)|\n)\s*(?P<rest>.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """text[start:end] must survive as it is. `kind` is one of KINDS."""

    start: int
    end: int
    kind: str


def protected_spans(text: str, facts: Sequence[str] = ()) -> list[Span]:
    """The pieces of `text` that must survive, in order, without overlaps (overlapping ones are joined)."""
    found = [*(Span(*form) for form in by_form(text)), *_names(text), *_facts(text, facts), *_material(text)]
    return _joined(sorted(found, key=lambda s: (s.start, -s.end)))


def breach(before: str, spans: Iterable[Span], after: str) -> str | None:
    """Why `after` does not keep the `spans` of `before`; None when it does.

    Each protected string must occur as often and in the same order; no number may be new, and the number of negations
    must stay odd or even.
    """
    spans = list(spans)
    pieces = {before[s.start : s.end] for s in spans}
    if pieces:
        pattern = re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))))
        old, new = pattern.findall(before), pattern.findall(after)
        if old != new:
            return _difference(old, new)
    if _of_kind("number", before) != _of_kind("number", after):
        return "numbers differ"
    if (len(_of_kind("negation", before)) - len(_of_kind("negation", after))) % 2:
        return "a negation came or went"
    return None


def _difference(old: list[str], new: list[str]) -> str:
    if sorted(old) == sorted(new):
        return "protected pieces changed their order"
    lost = next((piece for piece in old if new.count(piece) < old.count(piece)), None)
    return "a protected piece was lost" if lost is not None else "a protected piece was doubled"


def _of_kind(kind: str, text: str) -> list[str]:
    return sorted(re.sub(r"\s", "", text[start:end]) for start, end, found in by_form(text) if found == kind)


def _joined(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and span.start < joined[-1].end:
            last = joined[-1]
            joined[-1] = Span(last.start, max(last.end, span.end), last.kind)
        elif span.start < span.end:
            joined.append(span)
    return joined


def _material(text: str) -> Iterator[Span]:
    """What a task is about stands after its first colon or line break: 概括这段话：..."""
    match = _MATERIAL.search(text)
    if match and match["rest"].strip():
        yield Span(*match.span("rest"), "material")


def _facts(text: str, facts: Sequence[str]) -> Iterator[Span]:
    for fact in facts:
        if fact.strip():
            yield from (Span(m.start(), m.end(), "fact") for m in re.finditer(re.escape(fact), text))


# ---- names

_NAME_TAGS = ("nr", "ns", "nt", "nz", "nrt", "nrfg")
# Everyday words that jieba's dictionary calls names.
_NO_NAMES = frozenset(
    re.findall(
        r"\w+",
        "谢谢 多谢 安静 宁静 温馨 美丽 美味 明白 通顺 马虎 宁可 康复 黑屏 换货 贵店 顾客 老公 祖母 玉米 凤梨 西红柿"
        " 公共汽车 广告语 祝福语 祝词 益处 英勇 阳光 和平 雷达 滤网",
    )
)
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’&.-][A-Za-z\u00c0-\u024f]+)*")
_CAPITALS = re.compile(
    r"(?<![A-Za-z0-9])[A-Z][A-Za-z\u00c0-\u024f]*(?:['’-][A-Za-z]+)*(?:\s(?:(?:of|the|and|de|van|von|al)\s)*[A-Z][A-Za-z\u00c0-\u024f]*(?:['’-][A-Za-z]+)*)*"
)
_CAMEL = re.compile(r"(?<![A-Za-z0-9])[a-z]+[A-Z][A-Za-z]*")
_SENTENCE_START = re.compile(r"(?:\A|[.!?:;。！？：；\n“\"(])[\s\"'“(*-]*\Z")
_PRONOUN = re.compile(r"I(?:['’](?:m|ve|ll|d))?\Z")
# Words that open English sentences without being names.
_OPENERS = frozenset(
    re.findall(
        r"\w+",
        "a about add after all also although am an and any are as ask at based be because before both but by"
        " calculate can check choose classify come compare complete compose compute consider construct convert"
        " could create currently describe design determine develop did discuss do does edit each every explain find"
        " following for from furthermore generate get give given had has have hello help here hey hi how however"
        " identify if imagine in is it its let list look make may maybe might moreover must my name need no not of"
        " often on once one or our outline perhaps please predict pretend produce propose provide rank rate read"
        " recently recommend remove rephrase replace rewrite search select share should show since so some"
        " sometimes sort suggest sum summarise summarize tell thank thanks that the their then there therefore"
        " these they think this those though to today translate turn type under until use using usually was we were"
        " what when where which while who whose why will with would write yes you your",
    )
)


def _names(text: str) -> Iterator[Span]:
    num_han = count_han(text)
    if num_han:
        yield from _chinese_names(text)
    if num_han * 2 > len(text.split()):  # Latin words in a Chinese sentence are names, brands, terms
        yield from (Span(m.start(), m.end(), "name") for m in _LATIN.finditer(text))
        return
    yield from (Span(m.start(), m.end(), "name") for m in _CAMEL.finditer(text))
    for match in _CAPITALS.finditer(text):
        start = _name_start(text, match)
        if start < match.end():
            yield Span(start, match.end(), "name")


def _name_start(text: str, match: re.Match[str]) -> int:
    """Where the name begins in a run of capitalised words: after "I", and after a common word that opens a sentence."""
    words = list(re.finditer(r"\S+", match[0]))
    for word in words:
        opens = _SENTENCE_START.search(text, max(0, match.start() - 8), match.start()) and word.start() == 0
        if not (_PRONOUN.match(word[0]) or (opens and _is_opener(word[0]))):
            return match.start() + word.start()
    return match.end()


def _is_opener(word: str) -> bool:
    """Also of contracted words: can't, don't, what's."""
    lower = word.lower().rstrip(",")
    return bool({lower, re.sub(r"['’]\w+\Z", "", lower), re.sub(r"n['’]t\Z", "", lower)} & _OPENERS)


def _chinese_names(text: str) -> Iterator[Span]:
    at = 0
    for word, flag in tagged(text):
        if flag in _NAME_TAGS and len(word) > 1 and word not in _NO_NAMES:
            yield Span(at, at + len(word), "name")
        at += len(word)


# ---- words


@functools.lru_cache(maxsize=512)
def tagged(text: str) -> tuple[tuple[str, str], ...]:
    """(word, part of speech) of the text by jieba, without gaps."""
    return tuple((pair.word, pair.flag) for pair in _tagger()(text))


@functools.cache
def _tagger() -> Callable[[str], Iterable[Any]]:
    import jieba  # reads a 5 MB dictionary: only when something is reworded
    import jieba.posseg

    jieba.setLogLevel(logging.WARNING)
    cut: Callable[[str], Iterable[Any]] = jieba.posseg.POSTokenizer(jieba.Tokenizer()).cut
    return cut
