"""Bytes of a data file -> text: UTF-8 first, GBK/GB18030 where the file is that.

A file is taken for GB18030 (which contains GBK and GB2312) when nothing before its first bytes that are not UTF-8 was
UTF-8 text, and in the megabyte from there on more strings are GB18030 than UTF-8. Anything else is damage, reported by
line. Not here: rows and JSON (`rows.py`).
"""

from __future__ import annotations

from typing import BinaryIO

_SAMPLE_BYTES = 1 << 20
BOM_UTF8 = b"\xef\xbb\xbf"
_BOMS_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def starts_as_utf16(head: bytes) -> bool:
    """Whether a file begins as UTF-16, with its mark or as ASCII text with every other byte zero."""
    return head.startswith(_BOMS_UTF16) or (len(head) >= 4 and (not any(head[1:4:2]) or not any(head[0:4:2])))


class Decoder:
    """Decodes one file in stretches that end between characters, and decides once what the file is."""

    def __init__(self, file: BinaryIO) -> None:
        self.is_gb = False
        self._file = file
        self._num_utf8 = 0  # stretches seen that are UTF-8 and not merely ASCII

    def decode(self, data: bytes) -> str:
        """Text of the stretch just read from the file. Raises UnicodeDecodeError for damage."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            if not self._num_utf8 and not self.is_gb:
                self.is_gb = _is_gb(data + _peek(self._file))
            if self.is_gb:
                return data.decode("gb18030")
            raise
        self._num_utf8 += not data.isascii()
        return text

    def decode_damaged(self, data: bytes) -> str:
        """As `decode`, but bytes that are no text become lone surrogates, which no sound text holds."""
        try:
            return self.decode(data)
        except UnicodeDecodeError:
            return data.decode("gb18030" if self.is_gb else "utf-8", "surrogateescape")


def _peek(file: BinaryIO) -> bytes:
    position = file.tell()
    data = file.read(_SAMPLE_BYTES)
    file.seek(position)
    return data


def _is_gb(sample: bytes) -> bool:
    # A quote is never part of a character in either encoding, so it cuts JSON into strings that can be told apart.
    strings = [s for s in sample.split(b'"')[:-1] if not s.isascii()]
    num_utf8 = sum(_decodes(s, "utf-8") for s in strings)
    num_gb = sum(_decodes(s, "gb18030") and not _decodes(s, "utf-8") for s in strings)
    return num_gb > num_utf8


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
