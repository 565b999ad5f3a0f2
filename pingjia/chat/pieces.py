"""What each token of a `tokenizers` vocabulary contributes to the text, as bytes.

Here: the two byte-exact kinds of decoder that causal language models use (byte-level; SentencePiece with byte
fallback) and a window over `Tokenizer.decode` for every other kind. Not here: assembling bytes into characters
(`tokenizer.ByteStream`) and the SentencePiece models of ChatGLM (`chatglm.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pingjia.chat.tokenizer import ByteStream, StreamDecoder

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_KNOWN_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip"}


def stream_factory(tokenizer: tokenizers.Tokenizer, skip: frozenset[int]) -> Callable[[], StreamDecoder]:
    """What makes a fresh StreamDecoder for this vocabulary; ids in `skip` and unknown ids give no text."""
    to_bytes = token_bytes(tokenizer)
    if to_bytes is None:
        return lambda: WindowStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), skip)
    piece = _cached(tokenizer, skip, to_bytes)
    strip = any(step["type"] == "Strip" for step in _steps(tokenizer))
    return lambda: ByteStream(piece, strip_space=strip)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
    """What turns a token, as the vocabulary writes it, into its bytes; None where a token alone has no fixed bytes."""
    steps = _steps(tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    if "ByteFallback" in kinds and set(kinds) <= _KNOWN_STEPS and all(map(_is_plain, steps)):
        return _byte_fallback(steps)
    return None


def _steps(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return list(steps)


def _is_plain(step: dict[str, Any]) -> bool:
    """Whether a step is one that `_byte_fallback` reproduces: literal replacement, one space stripped at the left."""
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] != "Strip" or (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _cached(
    tokenizer: tokenizers.Tokenizer, skip: frozenset[int], to_bytes: Callable[[str], bytes]
) -> Callable[[int], bytes]:
    table: dict[int, bytes] = {}  # filled as tokens are met: a whole table of 150,000 would cost 0.3 s at loading

    def piece(token: int) -> bytes:
        found = table.get(token)
        if found is None:
            text = None if token in skip or token < 0 else tokenizer.id_to_token(token)
            found = table[token] = b"" if text is None else to_bytes(text)
        return found

    return piece


def _byte_level() -> Callable[[str], bytes]:
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}

    def to_bytes(text: str) -> bytes:
        try:
            return bytes([byte_of[c] for c in text])
        except KeyError:  # an added token, stored as ordinary text
            return text.encode()

    return to_bytes


def byte_alphabet() -> str:
    """The 256 printable characters that byte-level BPE writes for bytes 0..255 (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(b if b in printable else next(spare)) for b in range(256))


def _byte_fallback(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    replaced = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]

    def to_bytes(text: str) -> bytes:
        if m := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(m.group(1), 16)])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    return to_bytes


class WindowStream:
    """StreamDecoder for decoders whose output depends on the neighbours (word pieces, leading spaces).

    Decodes the last few tokens with and without the new ones; what was added is the new text. Work per token is that
    of a window, not of the whole answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: frozenset[int]) -> None:
        self._decode = decode
        self._skip = skip
        self._seen: list[int] = []  # a few tokens whose text is out: the neighbours of the next one
        self._held: list[int] = []  # tokens whose text is not out yet

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(self._feed_one(token) for token in ids if token not in self._skip)

    def flush(self) -> str:
        return self._emit(self._text_of_held())

    def _feed_one(self, token: int) -> str:
        self._held.append(token)
        text = self._text_of_held()
        return "" if text.endswith("\ufffd") else self._emit(text)

    def _text_of_held(self) -> str:
        if not self._held:
            return ""
        before = self._decode(self._seen) if self._seen else ""
        return self._decode(self._seen + self._held)[len(before) :]

    def _emit(self, text: str) -> str:
        self._seen = (self._seen + self._held)[-4:]
        self._held = []
        return text
