"""Text in, text out, piece by piece: what ChatGLM's decoding does to text after its tokens became text.

Every stage takes pieces and gives pieces whose join equals what it would make of the whole text at once; it holds back
only what later text could still change. Not here: tokens (`sentencepieces.py`) and which family uses which stage
(`chatglm.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from pingjia.chat.tokenizer import StreamDecoder


class TextStage(Protocol):
    """One step of post-processing; one per answer."""

    def feed(self, text: str) -> str: ...

    def flush(self) -> str:
        """What was held back. Call once, after the last `feed`."""
        ...


class StagedStream:
    """StreamDecoder: a stream of tokens, its text passed through stages."""

    def __init__(self, stream: StreamDecoder, stages: Sequence[TextStage]) -> None:
        self._stream = stream
        self._stages = stages

    def feed(self, ids: Sequence[int]) -> str:
        text = self._stream.feed(ids)
        for stage in self._stages:
            text = stage.feed(text)
        return text

    def flush(self) -> str:
        text = self._stream.flush()
        for stage in self._stages:
            text = stage.feed(text) + stage.flush()
        return text


class Replace:
    """Replace literal strings. No string may hold the start of another one inside it."""

    def __init__(self, replacements: Mapping[str, str]) -> None:
        self._replacements = replacements
        self._pattern = re.compile("|".join(map(re.escape, replacements)))
        self._prefixes = {old[:n] for old in replacements for n in range(1, len(old))}
        self._longest = max(map(len, replacements)) - 1
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        cut = len(text) - self._open_length(text)
        text, self._held = text[:cut], text[cut:]
        return self._pattern.sub(lambda m: self._replacements[m.group()], text)

    def flush(self) -> str:
        return self._held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the strings begins."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up_spaces(text: str) -> str:
    """transformers' old clean-up of English spacing, one pass after the other, as published decoding applies it."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


class CleanUpSpaces:
    """`clean_up_spaces` as a stage.

    All its patterns begin with a space and go on with the characters of `_INNER` only, except for a last letter; and it
    only ever removes spaces. So any other character ends what can still change, and a run of these characters can
    change no earlier than at its first space.
    """

    _INNER = " '.,?!nvr"

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        start = text.find(" ", len(text.rstrip(self._INNER)))
        cut = len(text) if start < 0 else start
        text, self._held = text[:cut], text[cut:]
        return clean_up_spaces(text)

    def flush(self) -> str:
        return clean_up_spaces(self._held)


class Strip:
    """str.strip: white space at the start is dropped, that at the end is held until more text follows."""

    def __init__(self) -> None:
        self._started = False
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def flush(self) -> str:
        return ""


_FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def full_width_punctuation(text: str) -> str:
    """`, ! : ; ?` become full width where a Chinese character stands right before or after. Keeps the length."""
    return _BESIDE_CHINESE.sub(lambda m: _FULL_WIDTH[m.group()], text)


class ChinesePunctuation:
    """`full_width_punctuation` as a stage: a mark that may still meet a Chinese character is held."""

    def __init__(self) -> None:
        self._before = ""  # the last character that is out, as it came in
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        if not text:
            return ""
        marked = full_width_punctuation(self._before + text)[len(self._before) :]
        cut = len(text) - (marked[-1] in _FULL_WIDTH)
        self._before, self._held = (self._before + text[:cut])[-1:], text[cut:]
        return marked[:cut]

    def flush(self) -> str:
        return self._held
