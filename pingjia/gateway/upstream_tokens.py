"""How many tokens a text probably has, where no tokenizer is at hand. Pure.

Good enough to decide who is let in; what is billed and written down is what the server counted. Not here: asking a
server that can count (`upstream_server.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Per character, rather too many than too few. Han: current vocabularies need 0.6 to 0.8 a character, older ones 1 to
# 1.5; English takes a token for 4 to 5 characters, other scripts more.
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_PER_HAN = 1.0
_PER_ASCII = 0.28
_PER_OTHER = 0.6
_PER_MESSAGE = 5  # role and marks around a turn
_PER_PROMPT = 5
_SMOOTHING = 0.1
_FEWEST, _MOST = 0.25, 4.0  # beyond this a server counts something else than the text, such as pictures


def estimate_tokens(text: str) -> int:
    """At least 1 for any text."""
    num_ascii = len(text.encode("ascii", "ignore"))
    num_han = 0 if num_ascii == len(text) else len(_HAN.findall(text))
    num_other = len(text) - num_ascii - num_han
    return 1 + int(num_ascii * _PER_ASCII + num_han * _PER_HAN + num_other * _PER_OTHER)


def estimate_prompt(texts: Iterable[str]) -> int:
    """Tokens of a conversation of these turns."""
    return _PER_PROMPT + sum(_PER_MESSAGE + estimate_tokens(text) for text in texts)


class Correction:
    """What a server counts beside what was estimated, learnt from its answers. One per model."""

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, estimated: int, counted: int) -> None:
        """Take note of a prompt that the server counted."""
        if estimated > 0 and counted > 0:
            ratio = min(_MOST, max(_FEWEST, counted / estimated))
            self.factor += _SMOOTHING * (ratio - self.factor)

    def apply(self, estimated: int) -> int:
        return max(1, round(estimated * self.factor))
