"""Text -> the tokens that ROUGE and BLEU count. One tokeniser for Chinese, English and mixtures of both.

Not the model's tokenizer: scores must not change with the model.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
from typing import Any


def normalise(text: str) -> str:
    """NFKC (full-width letters, digits, signs become half-width), lower case, whitespace runs become one space."""
    # Lowering can undo NFKC (some capitals lower to a letter and a combining mark), hence the second pass.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    return " ".join(folded.split())


@functools.cache
def _segmenter() -> Any:
    import jieba  # reads a 5 MB dictionary: only when something is scored

    jieba.setLogLevel(logging.WARNING)
    # Our own instance: words that a program adds to the shared one must not change scores.
    return jieba.Tokenizer()


def tokenise(text: str) -> list[str]:
    """Words of the normalised text as jieba cuts them; punctuation marks are tokens, whitespace is not.

    The same cut as `" ".join(jieba.cut(text))`, which the Chinese ROUGE tools of this field are fed with.
    """
    return [token for token in _segmenter().lcut(normalise(text)) if not token.isspace()]
