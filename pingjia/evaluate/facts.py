"""Does an answer state the facts it must? Exact comparison of characters, with numbers kept whole.

What counts as equal: full and half width, upper and lower case, any whitespace, 1,000 and 1000. What does not: a
number inside a longer number (36个月 in 136个月, 5元 in 3.5元 or -5元, 六个月 in 三十六个月, 5 in 5万). Digits and
Chinese numerals are different characters: 36 is not 三十六; list both facts as separate questions if both are right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LIST_COMMA = "\ue000"  # stands for a full-width comma while NFKC runs (private use: no text means anything by it)
_BREAK = "\ue001"  # between two numbers that only lost the whitespace between them

_UNIT = "(?:[十百万亿]|千(?![克米瓦卡帕伏赫]))"  # 5千 is a number, the 千 of 5千克 belongs to its unit
_HANZI = "[〇零一二两三四五六七八九十百千万亿]+"
_NUMBER = re.compile(
    rf"(?:(?:(?<=[:,(=、。;\s])|^)-)?(?:\d+(?:\.\d+)*{_UNIT}*)+"  # 36, 3.5, -5, 3万5千
    rf"|{_HANZI}(?:点{_HANZI})?"  # 三十六, 三点五
)
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d)")
# "100，200，300" is a list as often as a number; a group that begins with 0 is surely no number of its own.
_SURE_THOUSANDS = re.compile(
    rf"(?<![\d.])(?<!\d[,{_LIST_COMMA}])\d{{1,3}}{_LIST_COMMA}0\d\d(?:{_LIST_COMMA}\d{{3}})*(?!\d)"
)


@dataclass(frozen=True, slots=True)
class _Canonical:
    """Text without whitespace; `cuts` are the positions that lie strictly inside a number."""

    text: str
    cuts: frozenset[int]


def missing_facts(answer: str, facts: Sequence[str]) -> tuple[str, ...]:
    """Those of `facts` that the answer does not state, in their order."""
    if not facts:
        return ()
    readings = list(_readings(answer))
    return tuple(fact for fact in facts if not _stated(fact, readings))


def has_fact(answer: str, fact: str) -> bool:
    """Whether the answer states the fact."""
    return not missing_facts(answer, [fact])


def is_blank(fact: str) -> bool:
    """Whether nothing of the fact is left to look for."""
    return not any(reading.text for reading in _readings(fact))


def _stated(fact: str, answer_readings: Sequence[_Canonical]) -> bool:
    return any(_occurs(needle.text, answer) for needle, answer in zip(_readings(fact), answer_readings, strict=True))


def _occurs(needle: str, answer: _Canonical) -> bool:
    start = answer.text.find(needle) if needle else -1
    while start >= 0:
        if start not in answer.cuts and start + len(needle) not in answer.cuts:
            return True
        start = answer.text.find(needle, start + 1)
    return False


def _readings(text: str) -> Iterator[_Canonical]:
    """Two readings, for 1，000 written with the full-width comma: as a list of numbers, and as one number."""
    folded = _fold(text)
    as_list = _SURE_THOUSANDS.sub(lambda m: m[0].replace(_LIST_COMMA, ""), folded)
    for spaced in (as_list, folded.replace(_LIST_COMMA, ",")):
        yield _compact(_THOUSANDS.sub(lambda m: m[0].replace(",", ""), spaced).replace(_LIST_COMMA, ","))


def _fold(text: str) -> str:
    # ① and ² become plain digits under NFKC: "①36个月" would read 136个月. Numbers that are no digits stand alone.
    apart = "".join(f" {c} " if unicodedata.category(c) == "No" else c for c in text.replace("，", _LIST_COMMA))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", apart).casefold())
    visible = "".join(c for c in folded if unicodedata.category(c) != "Cf").replace("−", "-")
    # The point of a numbered list ("1. 36个月") is not a decimal point.
    return re.sub(r"(?<=\d)\.\s+(?=\d)", f".{_BREAK}", visible)


def _compact(spaced: str) -> _Canonical:
    """Drop whitespace, after finding the numbers: whitespace ends one."""
    place = [0]  # place[i] is where character i of `spaced` goes
    for c in spaced:
        place.append(place[-1] + (not c.isspace()))
    inside = (range(place[m.start()] + 1, place[m.end()]) for m in _NUMBER.finditer(spaced))
    return _Canonical("".join(spaced.split()), frozenset(i for span in inside for i in span))
