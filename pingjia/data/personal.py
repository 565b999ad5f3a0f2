"""Personal data in texts: found by form and checksum, reported or masked.

Numbers and addresses of companies and services (400-, 95xxx, 12315, help@) are not personal. Names and street addresses
are not looked for: without a register that is guessing, and a guess that fails silently is worse than none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from pingjia.data.script import count_han
from pingjia.types import Example, Message

KINDS = ("id_card", "bank_card", "phone", "email", "order_number")  # what wins where two kinds overlap comes first
_MASKS = {
    "phone": ("【手机号】", "[PHONE]"),
    "id_card": ("【身份证号】", "[ID CARD]"),
    "bank_card": ("【银行卡号】", "[BANK CARD]"),
    "email": ("【邮箱】", "[EMAIL]"),
    "order_number": ("【订单号】", "[ORDER NUMBER]"),
}
_WIDE = str.maketrans("０１２３４５６７８９－＋＠．　（）ＸxｘX", "0123456789-+@. ()XXXX")

_MOBILE = re.compile(r"(?<![\d.])(?:(?:\+|00)?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![\d.]?\d)")
_LANDLINE = re.compile(
    r"(?<![\d-])(?:0(?:10|2\d|[3-9]\d{2})|\(0(?:10|2\d|[3-9]\d{2})\))[- ]?[2-9]\d{6,7}(?:-\d{1,5})?(?![\d-])"
)
_ID18 = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{5}(?:1[89]|20)\d{9}[\dX](?![0-9A-Za-z])")
_ID15 = re.compile(r"(?<![0-9A-Za-z])[1-8]\d{5}\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?![0-9A-Za-z])")
_CARD = re.compile(r"(?<![\d-])(?:\d[ -]?){12,18}\d(?![ -]?\d)")
_CARD_STARTS = ("62", "4", "51", "52", "53", "54", "55", "34", "37", "35", "36", "6011", "2221", "81")
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
_OFFICE = re.compile(
    r"(?:help|info|service|support|sales|contact|admin|hr|office|press|no-?reply|kefu|fuwu|postmaster|webmaster)\d*@",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"(?:订单(?:编?号|号码)?|单号|运单号?|快递单?号|流水号|交易号"
    r"|order\s*(?:no\.?|number|id|#)|tracking\s*(?:no\.?|number|id|#)|order\s+(?=#?[A-Za-z]*\d{6}))"
    r"\s*(?:是|为|is)?\s*[:：#=]?\s*#?(?P<number>(?=[A-Za-z-]{0,8}\d)[A-Za-z0-9][A-Za-z0-9-]{4,31})(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_PROVINCES = frozenset(
    [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83]
)


@dataclass(frozen=True, slots=True)
class Personal:
    """text[start:end] is personal data of a kind."""

    start: int
    end: int
    kind: str


def find_personal(text: str, kinds: Collection[str] = KINDS) -> list[Personal]:
    """What is personal in a text, in order and without overlaps. Full-width digits count as digits."""
    if not _may_hold(text):
        return []
    flat = text.translate(_WIDE)  # one character for one, so places stay
    found: list[Personal] = []
    for kind in KINDS:
        if kind in kinds:
            found += [p for p in _FINDERS[kind](flat) if not any(p.start < o.end and o.start < p.end for o in found)]
    return sorted(found, key=lambda p: p.start)


def _may_hold(text: str) -> bool:
    """A quick no: every kind has an @ or at least 5 digits."""
    return "@" in text or "＠" in text or sum(map(str.isdigit, text)) >= 5


def mask(text: str, kinds: Collection[str] = KINDS, *, english: bool | None = None) -> tuple[str, Counter[str]]:
    """The text with 【手机号】 or [PHONE] for what is personal, and how many of each kind.

    `english` None: English where no Chinese character is in the text. A row has one language for all its texts, so that
    a fact still stands in its answer.
    """
    found = find_personal(text, kinds)
    if not found:
        return text, Counter()
    english = count_han(text) == 0 if english is None else english
    pieces, at = [], 0
    for p in found:
        pieces += [text[at : p.start], _MASKS[p.kind][english]]
        at = p.end
    return "".join([*pieces, text[at:]]), Counter(p.kind for p in found)


def mask_example(example: Example, kinds: Collection[str] = KINDS) -> tuple[Example, Counter[str]]:
    """An example with every text masked: turns, facts and reference. The same object when nothing was found."""
    total: Counter[str] = Counter()
    english = not any(count_han(m.content) for m in example.messages)

    def masked(text: str) -> str:
        result, found = mask(text, kinds, english=english)
        total.update(found)
        return result

    messages = tuple(_masked_turn(m, masked) for m in example.messages)
    if not total:
        return example, total
    count = total.copy()  # facts and reference repeat what the turns say; they are not counted again
    facts = tuple(masked(fact) for fact in example.facts)
    reference = masked(example.reference) if example.reference is not None else None
    return replace(example, messages=messages, facts=facts, reference=reference), count


def _masked_turn(message: Message, masked: Callable[[str], str]) -> Message:
    text = masked(message.content)
    return message if text == message.content else replace(message, content=text)


def mask_row(row: Mapping[str, Any], kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """A row of a file with every string in it masked, at any depth; keys stay."""
    english = not any(map(count_han, _strings(row)))
    masked: dict[str, Any] = _masked_value(dict(row), kinds, english)
    return masked


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _masked_value(value: Any, kinds: Collection[str], english: bool) -> Any:
    if isinstance(value, str):
        return mask(value, kinds, english=english)[0]
    if isinstance(value, list):
        return [_masked_value(item, kinds, english) for item in value]
    if isinstance(value, dict):
        return {key: _masked_value(item, kinds, english) for key, item in value.items()}
    return value


# ---- one finder per kind, over text whose digits are ASCII


def _phones(text: str) -> Iterator[Personal]:
    for pattern in (_MOBILE, _LANDLINE):
        for match in pattern.finditer(text):
            yield Personal(match.start(), match.end(), "phone")


def _id_cards(text: str) -> Iterator[Personal]:
    for match in _ID18.finditer(text):
        if is_id_card(match.group()):
            yield Personal(match.start(), match.end(), "id_card")
    for match in _ID15.finditer(text):
        digits = match.group()
        if int(digits[:2]) in _PROVINCES and _is_date(1900 + int(digits[6:8]), digits[8:10], digits[10:12]):
            yield Personal(match.start(), match.end(), "id_card")


def is_id_card(number: str) -> bool:
    """Whether 18 characters are an identity card number: province, date of birth, check digit (GB 11643-1999)."""
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], _ID_WEIGHTS, strict=True))
    born = _is_date(int(number[6:10]), number[10:12], number[12:14])
    return int(number[:2]) in _PROVINCES and born and _ID_CHECKS[total % 11] == number[17]


def _is_date(year: int, month: str, day: str) -> bool:
    try:
        date(year, int(month), int(day))
    except ValueError:
        return False
    return True


def _bank_cards(text: str) -> Iterator[Personal]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits.startswith(_CARD_STARTS) and 13 <= len(digits) <= 19 and is_luhn(digits):
            yield Personal(match.start(), match.end(), "bank_card")


def is_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    doubled = (int(d) * 2 for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def _emails(text: str) -> Iterator[Personal]:
    for match in _EMAIL.finditer(text):
        if not _OFFICE.match(match.group()):
            yield Personal(match.start(), match.end(), "email")


def _order_numbers(text: str) -> Iterator[Personal]:
    for match in _ORDER.finditer(text):
        yield Personal(match.start("number"), match.end("number"), "order_number")


_FINDERS: Mapping[str, Callable[[str], Iterator[Personal]]] = {
    "id_card": _id_cards,
    "bank_card": _bank_cards,
    "phone": _phones,
    "email": _emails,
    "order_number": _order_numbers,
}
