"""How Chinese a text is, by counting characters."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Unicode script Han, without radicals and strokes: 々 〇, extension A, the main block, compatibility, extensions B-J.
_HAN = re.compile("[々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufad9\U00020000-\U000323af\U000323b0-\U0003347f]")


def count_han(text: str) -> int:
    """Number of Chinese characters (script Han) in `text`."""
    return 0 if text.isascii() else len(_HAN.findall(text))


def count_letters(text: str) -> int:
    """Number of letters of any script (Unicode category L), 〇 included. Digits, punctuation and symbols are none."""
    return sum(map(str.isalpha, text)) + text.count("〇")


def zh_share(texts: Iterable[str]) -> float | None:
    """Chinese characters / letters over all texts; None when there is no letter."""
    num_han = num_letters = 0
    for text in texts:
        num_han += count_han(text)
        num_letters += count_letters(text)
    return num_han / num_letters if num_letters else None
