"""Bytes of a data file -> text: UTF-8 first, GBK/GB18030 where the file is that.

A file is taken for GB18030 (which contains GBK and GB2312) when in the 256 KiB from its first non-ASCII line on more
strings are GB18030 than UTF-8. Anything else is damage, reported by line. Not here: rows (`rows.py`).
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from typing import BinaryIO

_SAMPLE_BYTES = 1 << 18
BOM_UTF8 = b"\xef\xbb\xbf"
_BOMS_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def starts_as_utf16(head: bytes) -> bool:
    """Whether a file begins as UTF-16, with its mark or as ASCII text with every other byte zero."""
    return head.startswith(_BOMS_UTF16) or (len(head) >= 4 and (not any(head[1:4:2]) or not any(head[0:4:2])))


class Decoder:
    """Decodes one file in stretches that end between characters. What the file is, its first non-ASCII text decides."""

    def __init__(self, file: BinaryIO, *, is_table: bool = False) -> None:
        self.is_gb = False
        self._is_decided = False
        self._file = file
        self._borders = _CELL_BORDERS if is_table else _STRING_BORDERS

    @property
    def encoding(self) -> str:
        return "GB18030" if self.is_gb else "UTF-8"

    def decode(self, data: bytes) -> str:
        """Text of the stretch just read from the file. Raises UnicodeDecodeError for damage."""
        if data.isascii():
            return data.decode("ascii")
        if not self._is_decided:
            self._is_decided, self.is_gb = True, _is_gb(data, self._file, self._borders)
        if self.is_gb and _kind(data) is not Kind.UTF8:  # files glued together from both are read right, too
            return data.decode("gb18030")
        return data.decode("utf-8")

    def decode_damaged(self, data: bytes) -> str:
        """As `decode`, but bytes that are no text become lone surrogates, which no sound text holds."""
        try:
            return self.decode(data)
        except UnicodeDecodeError:
            return data.decode("gb18030" if self.is_gb else "utf-8", "surrogateescape")


class Kind(enum.Enum):
    """What some bytes are. EITHER: UTF-8 of two-byte characters only, which common Chinese in GBK can look like."""

    ASCII = enum.auto()
    UTF8 = enum.auto()
    EITHER = enum.auto()
    GB = enum.auto()
    NEITHER = enum.auto()


# A quote is never part of a character in either encoding, nor are separators, so they cut text into strings that can be
# told apart.
_STRING_BORDERS = re.compile(rb'"')
_CELL_BORDERS = re.compile(rb'[",;\t\r\n]')


def _is_gb(data: bytes, file: BinaryIO, borders: re.Pattern[bytes]) -> bool:
    ahead = _peek(file)
    strings = borders.split(data + ahead)
    if len(ahead) == _SAMPLE_BYTES:
        strings.pop()  # cut anywhere
    kinds = Counter(map(_kind, strings))
    return kinds[Kind.GB] > kinds[Kind.UTF8] + kinds[Kind.EITHER] / 2


def _peek(file: BinaryIO) -> bytes:
    position = file.tell()
    data = file.read(_SAMPLE_BYTES)
    file.seek(position)
    return data


def _kind(data: bytes) -> Kind:
    if data.isascii():
        return Kind.ASCII
    try:
        return Kind.UTF8 if max(data.decode("utf-8")) >= "\u0800" else Kind.EITHER
    except UnicodeDecodeError:
        pass
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return Kind.NEITHER
    return Kind.GB
