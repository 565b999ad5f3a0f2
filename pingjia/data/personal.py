"""Personal data in texts: found by form and checksum, reported or masked.

Numbers and addresses of companies and services (400-, 95xxx, 12315, help@) are not personal. Names and street addresses
are not looked for: without a register that is guessing, and a guess that fails silently is worse than none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from pingjia.script import count_han
from pingjia.types import Example, Message

# Where two kinds overlap the longer one wins, and of equally long ones the first of these: an identity card has a
# checksum and a date, and what a text calls an order number is one, also when it looks like a phone number.
KINDS = ("id_card", "order_number", "bank_card", "phone", "email")
_MASKS = {
    "phone": ("【手机号】", "[PHONE]"),
    "id_card": ("【身份证号】", "[ID CARD]"),
    "bank_card": ("【银行卡号】", "[BANK CARD]"),
    "email": ("【邮箱】", "[EMAIL]"),
    "order_number": ("【订单号】", "[ORDER NUMBER]"),
}
_WIDE = str.maketrans("０１２３４５６７８９－＋＠．　（）ＸxｘX", "0123456789-+@. ()XXXX")


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
    while new := _disjoint(p for kind in KINDS if kind in kinds for p in _FINDERS[kind](flat)):
        found += new
        for p in new:  # what touches it can be seen now: 13812345678@qq.com13912345678
            flat = flat[: p.start] + "】" * (p.end - p.start) + flat[p.end :]
    return sorted(found, key=lambda p: p.start)


def _may_hold(text: str) -> bool:
    """A quick no: every kind has an @ or at least 5 digits."""
    return "@" in text or "＠" in text or sum(map(str.isdigit, text)) >= 5


def _disjoint(found: Iterable[Personal]) -> list[Personal]:
    kept: list[Personal] = []
    for p in sorted(found, key=lambda p: (p.start - p.end, KINDS.index(p.kind), p.start)):
        if not any(p.start < other.end and other.start < p.end for other in kept):
            kept.append(p)
    return sorted(kept, key=lambda p: p.start)


# ---- masking


def mask(text: str, kinds: Collection[str] = KINDS, *, english: bool | None = None) -> tuple[str, Counter[str]]:
    """The text with 【手机号】 or [PHONE] for what is personal, and how many of each kind.

    `english` None: English where no Chinese character is in the text. A row has one language for all its texts, so that
    a fact still stands in its answer.
    """
    total: Counter[str] = Counter()
    while found := find_personal(text, kinds):  # again, because words and numbers have come closer to each other
        english = count_han(text) == 0 if english is None else english
        text = _replaced(text, found, english)
        total.update(p.kind for p in found)
    return text, total


def _replaced(text: str, found: Iterable[Personal], english: bool) -> str:
    pieces, at = [], 0
    for p in found:
        pieces += [text[at : p.start], _MASKS[p.kind][english]]
        at = p.end
    return "".join([*pieces, text[at:]])


def mask_example(example: Example, kinds: Collection[str] = KINDS) -> tuple[Example, Counter[str]]:
    """An example with every text masked: turns, facts and reference. The same object when nothing was found.

    Facts and reference repeat what the turns say; they are not counted.
    """
    reference = (example.reference,) if example.reference is not None else ()
    texts = [m.text for m in example.messages]
    secrets = _Secrets([*texts, *example.facts, *reference], kinds)
    if not secrets.are_any:
        return example, Counter()
    turns = tuple(_masked_turn(m, secrets) for m in example.messages)
    count = Counter(p.kind for text in texts for p in secrets.find(text))
    facts = tuple(secrets.masked_fact(fact, texts) for fact in example.facts)
    masked = replace(
        example,
        messages=turns,
        facts=facts,
        reference=secrets.masked(reference[0]) if reference else None,
    )
    return masked, count


def _masked_turn(message: Message, secrets: _Secrets) -> Message:
    text = _masked_text(message.content, secrets.masked)
    calls = tuple(replace(c, arguments=_masked_text(c.arguments, secrets.masked)) for c in message.tool_calls)
    is_same = text == message.content and calls == message.tool_calls
    return message if is_same else replace(message, content=text, tool_calls=calls)


def _masked_text(text: str, masked: Callable[[str], str]) -> str:
    """A text masked. JSON, as the arguments of a call, stays JSON: a number in it that is personal becomes a string."""
    result = masked(text)
    if result == text or not text.lstrip().startswith(("{", "[")) or _is_json(result) or not _is_json(text):
        return result
    return json.dumps(_masked_value(json.loads(text), masked), ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def mask_row(row: Mapping[str, Any], kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """A row of a file with every string in it masked, at any depth, and every number in its lists and objects; keys
    stay, and so do numbers of the row itself, such as an id."""
    texts = [*_strings({key: value for key, value in row.items() if key not in _LABELS and key != "facts"})]
    labels = [*_strings([row.get(key) for key in _LABELS])]
    secrets = _Secrets([*texts, *_strings(row.get("facts"))], kinds, labels)
    if not secrets.are_any:
        return dict(row)
    masked = {k: v if isinstance(v, int) else _masked_value(v, secrets.masked) for k, v in row.items()}
    if "facts" in row:
        masked["facts"] = _masked_value(row["facts"], lambda fact: secrets.masked_fact(fact, texts))
    return masked


_LABELS = ("domain", "lang", "topic", "source")  # masked as everything is, but no sign of a row's language


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from [str(item)] if isinstance(item, int) else _strings(item)


def _masked_value(value: Any, masked: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return _masked_text(value, masked)
    if isinstance(value, int):
        text = str(value)
        return value if (result := masked(text)) == text else result
    if isinstance(value, list):
        return [_masked_value(item, masked) for item in value]
    if isinstance(value, dict):
        return {key: _masked_value(item, masked) for key, item in value.items()}
    return value


class _Secrets:
    """What is personal in any text of a row is masked in all its texts.

    An order number is known by the words before it, which a fact or a later turn need not have.
    """

    def __init__(self, texts: Collection[str], kinds: Collection[str], labels: Collection[str] = ()) -> None:
        self._kinds = kinds
        self._known = {t[p.start : p.end]: p.kind for t in (*texts, *labels) for p in find_personal(t, kinds)}
        self._english = not any(map(count_han, texts)) if self._known else False

    @property
    def are_any(self) -> bool:
        return bool(self._known)

    def find(self, text: str) -> list[Personal]:
        again = (
            Personal(match.start(), match.end(), kind)
            for secret, kind in self._known.items()
            for match in re.finditer(rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])", text)
        )
        return _disjoint([*find_personal(text, self._kinds), *again])

    def masked(self, text: str) -> str:
        return mask(_replaced(text, self.find(text), self._english), self._kinds, english=self._english)[0]

    def masked_fact(self, fact: str, texts: Collection[str]) -> str:
        """A fact that is a part of something personal (the last digits of a number) becomes its mask: otherwise it
        would stand in no answer any more."""
        kind = next((kind for secret, kind in self._known.items() if fact and fact in secret), None)
        is_gone = kind is not None and not any(fact in self.masked(text) for text in texts)
        return _MASKS[kind][self._english] if kind is not None and is_gone else self.masked(fact)


# ---- one finder per kind, over text whose digits are ASCII

_MOBILE = re.compile(
    r"(?<![\d.])(?:(?:\((?:\+|00)?86\)|(?:\+|00)?86)[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![\d.]?\d)(?![A-Za-z_])"
)
_BEFORE_MOBILE = re.compile(r"[A-Za-z_]+\Z")
_CALLS = frozenset(["call", "cell", "mob", "mobile", "phone", "tel", "v", "vx", "wechat", "weixin", "whatsapp", "wx"])
_LANDLINE = re.compile(
    r"(?<![\d.-])(?:(?:\+|00)86[- ]?(?:10|2\d|[3-9]\d{2})|0(?:10|2\d|[3-9]\d{2})|\(0(?:10|2\d|[3-9]\d{2})\))"
    r"[- ]?[2-9]\d{2,3}[- ]?\d{4}(?:(?:-|转| ?ext\.? ?)\d{1,5})?(?![\d-]|\.\d)(?![A-Za-z_])"
)


def _phones(text: str) -> Iterator[Personal]:
    for match in _MOBILE.finditer(text):
        before = _BEFORE_MOBILE.search(text, max(0, match.start() - 12), match.start())
        if before is None or before.group().lower() in _CALLS:  # SN13812345678 is the number of a thing
            yield Personal(match.start(), match.end(), "phone")
    for match in _LANDLINE.finditer(text):
        yield Personal(match.start(), match.end(), "phone")


_ID18 = re.compile(r"(?<!\d)[1-9]\d{5}[ -]?(?:1[89]|20)\d{6}[ -]?\d{3}[\dX](?![0-9A-Za-z])")
_ID15 = re.compile(r"(?<!\d)[1-8]\d{5}\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?![0-9A-Za-z])")
_ID_WORD = re.compile(r"身份证(?!号】)|证件号|居民证|\b(?:id|identity)\s*(?:card(?!\])|no|number)", re.IGNORECASE)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_PROVINCES = frozenset(
    [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83]
)


def _id_cards(text: str) -> Iterator[Personal]:
    for match in _ID18.finditer(text):
        if is_id_card(re.sub("[ -]", "", match.group())):
            yield Personal(match.start(), match.end(), "id_card")
    for match in _ID15.finditer(text):  # no check digit: one number of 15 digits in 60 looks like it, so words decide
        if _is_old_id_card(match.group()) and _ID_WORD.search(text, max(0, match.start() - 20), match.start()):
            yield Personal(match.start(), match.end(), "id_card")


def is_id_card(number: str) -> bool:
    """Whether 18 characters are an identity card number: province, date of birth, check digit (GB 11643-1999)."""
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], _ID_WEIGHTS, strict=True))
    born = _is_date(int(number[6:10]), number[10:12], number[12:14])
    return int(number[:2]) in _PROVINCES and born and _ID_CHECKS[total % 11] == number[17]


def _is_old_id_card(digits: str) -> bool:
    return int(digits[:2]) in _PROVINCES and _is_date(1900 + int(digits[6:8]), digits[8:10], digits[10:12])


def _is_date(year: int, month: str, day: str) -> bool:
    try:
        date(year, int(month), int(day))
    except ValueError:
        return False
    return True


_CARD = re.compile(
    r"(?<![0-9A-Za-z.])(?<!\d[ -])"
    r"(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|3[47]\d{2}([ -])\d{6}\2\d{5})"
    r"(?![0-9A-Za-z]|\.\d)"
)
_CARD_WORD = re.compile(r"卡(?!号】)|\bcard(?!\])|\bvisa", re.IGNORECASE)


def _bank_cards(text: str) -> Iterator[Personal]:
    for match in _CARD.finditer(text):
        whole = match.group()
        for form in (whole, re.sub(r"[ -]\d{1,3}\Z", "", whole)):  # 4111 1111 1111 1111 2件: the last is no part of it
            digits = re.sub(r"\D", "", form)
            if _is_card_number(digits) and is_luhn(digits):
                is_short = len(digits) == 13  # as long as the number of a barcode
                if is_short and not _CARD_WORD.search(text, max(0, match.start() - 20), match.start()):
                    continue
                yield Personal(match.start(), match.start() + len(form), "bank_card")
                break


def _is_card_number(digits: str) -> bool:
    """Whether a number is as long as its first digits ask for: UnionPay, Visa, Mastercard, Amex, JCB, Diners."""
    return any(len(digits) in lengths and digits.startswith(starts) for starts, lengths in _CARD_FORMS)


_CARD_FORMS: tuple[tuple[tuple[str, ...], Collection[int]], ...] = (
    (("62", "81", "9558", "9559", "60", "68", "69"), range(16, 20)),
    (("4",), (13, 16, 18, 19)),
    (("51", "52", "53", "54", "55", *map(str, range(2221, 2721)), "35", "65"), (16,)),
    (("34", "37"), (15,)),
    (("30", "36", "38"), (14,)),
)


def is_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    doubled = (int(d) * 2 for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
_OFFICE = re.compile(
    r"(?:help|info|service|support|sales|contact|admin|hr|office|press|no-?reply|kefu|fuwu|postmaster|webmaster|git)"
    r"\d*@",
    re.IGNORECASE,
)


def _emails(text: str) -> Iterator[Personal]:
    for match in _EMAIL.finditer(text):
        if not _OFFICE.match(match.group()):
            yield Personal(match.start(), match.end(), "email")


_ORDER = re.compile(
    r"(?:(?P<bare>订单)(?:(?:编?号|号码)(?P<named>))?|(?<!菜)单号|运单号?|流水号|交易号"
    r"|order\s*(?:no\.?|number|id|#)|tracking\s*(?:no\.?|number|id|#)|order\s+(?=#?[A-Za-z]*\d{6}))"
    r"\s*(?:是|为|is)?\s*[:：#=]?\s*[#【“\"'(\[]?"
    r"(?P<number>(?=[A-Za-z-]{0,8}\d)[A-Za-z0-9][A-Za-z0-9-]{5,31})(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"\s*[元块万件个笔份台年月%％]")


def _order_numbers(text: str) -> Iterator[Personal]:
    for match in _ORDER.finditer(text):
        number = match["number"]
        is_named = match["bare"] is None or match["named"] is not None
        is_day = len(number) == 8 and number.isdigit() and _is_date(int(number[:4]), number[4:6], number[6:])
        if sum(map(str.isdigit, number)) >= 5 and not _AMOUNT.match(text, match.end()) and (is_named or not is_day):
            yield Personal(match.start("number"), match.end("number"), "order_number")


_FINDERS: Mapping[str, Callable[[str], Iterator[Personal]]] = {
    "id_card": _id_cards,
    "bank_card": _bank_cards,
    "phone": _phones,
    "email": _emails,
    "order_number": _order_numbers,
}
