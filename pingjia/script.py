"""How Chinese a text is, by counting characters."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Unicode script Han, without radicals and strokes: 々 〇, extension A, the main block, compatibility, extensions B-J.
_HAN_CLASS = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufad9\U00020000-\U000323af\U000323b0-\U0003347f"
_HAN = re.compile(f"[{_HAN_CLASS}]+")
_COMMON_LETTERS = re.compile(f"[a-zA-Z{_HAN_CLASS}]+")


def count_han(text: str) -> int:
    """Number of Chinese characters (script Han) in `text`."""
    return 0 if text.isascii() else sum(map(len, _HAN.findall(text)))


def count_letters(text: str) -> int:
    """Number of letters of any script (Unicode category L), 〇 included. Digits, punctuation and symbols are none."""
    rest = _COMMON_LETTERS.sub("", text)  # faster than asking every character
    return len(text) - len(rest) + sum(map(str.isalpha, rest))


def zh_share(texts: Iterable[str]) -> float | None:
    """Chinese characters / letters over all texts; None when there is no letter."""
    num_han = num_letters = 0
    for text in texts:
        num_han += count_han(text)
        num_letters += count_letters(text)
    return num_han / num_letters if num_letters else None
