"""A data file -> raw rows with their lines, in constant memory: JSON Lines, or one JSON array of objects.

A row that is no JSON object is reported by line and passed over; nothing ends the reading but the end of the file. Not
here: encodings (`encoding.py`) and what the fields of a row mean (`layouts.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pingjia.data.encoding import BOM_UTF8, Decoder, starts_as_utf16

MAX_ROW_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 16
_MAX_SHOWN = 1000  # of a row over the limit


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object of a file and the line it begins in."""

    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row or a file (line 0). `lost` is False for a remark: the row is there nevertheless.

    `text` is the row as it stands in the file, as far as it was read; bytes that are no text are written \\xNN.
    """

    line: int
    field: str
    reason: str
    lost: bool = True
    text: str = ""


def read_rows(path: Path) -> Iterator[Row | Fault]:
    """Rows and faults in file order. Never raises for what is in a file, or for a file that is not there."""
    try:
        with open(path, "rb") as file:
            yield from _read(file)
    except FileNotFoundError:
        yield Fault(0, "file", "no such file")
    except IsADirectoryError:
        yield Fault(0, "file", "is a directory; give the files in it")
    except OSError as e:
        yield Fault(0, "file", f"cannot be read: {e.strerror}")


def _read(file: BinaryIO) -> Iterator[Row | Fault]:
    head = file.read(4)
    if starts_as_utf16(head):
        yield Fault(0, "encoding", "UTF-16 or UTF-32 text; save the file as UTF-8")
        return
    if head.startswith(BOM_UTF8):
        yield Fault(1, "encoding", "begins with a byte order mark (BOM); passed over", lost=False)
    start = file.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
    first = _first_character(file)
    file.seek(start)
    if first is None:
        yield Fault(0, "file", "is empty; one JSON object per line is expected")
        return
    decoder = Decoder(file)
    yield from _read_array(file, decoder) if first == b"[" else _read_lines(file, decoder)
    if decoder.is_gb:
        yield Fault(0, "encoding", "GBK/GB18030 text, converted while reading; save the file as UTF-8", lost=False)


def _first_character(file: BinaryIO) -> bytes | None:
    while chunk := file.read(_CHUNK_BYTES):
        if stripped := chunk.lstrip():
            return stripped[:1]
    return None


# ---- JSON Lines


def _read_lines(file: BinaryIO, decoder: Decoder) -> Iterator[Row | Fault]:
    number = 0
    while data := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(data) > MAX_ROW_BYTES:
            size = len(data) + _skip_line(file)
            reason = f"has {size:,} bytes; the limit is {MAX_ROW_BYTES:,}"
            yield Fault(number, "line", reason, text=_shown(data[:_MAX_SHOWN]))
            continue
        if not data.strip():
            continue
        if number == 1 and data.strip() == b"{":
            yield Fault(0, "json", "the object is spread over several lines; write one object per line (JSON Lines)")
            return
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError as e:
            kind = "GB18030" if decoder.is_gb else "UTF-8"
            reason = f"byte {e.start + 1} of the line is no {kind} text, which the file is"
            yield Fault(number, "encoding", reason, text=_shown(data))
            continue
        yield _parse(text.strip(), number)


def _shown(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace").strip()


def _skip_line(file: BinaryIO) -> int:
    """Pass over the rest of a line; its number of bytes."""
    size = 0
    while data := file.readline(_CHUNK_BYTES):
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


# ---- one array


@dataclass(frozen=True, slots=True)
class _Element:
    """What stands between two commas of an array. `text` is its beginning when `size` is over the limit."""

    line: int
    text: str
    size: int
    is_closed: bool


def _read_array(file: BinaryIO, decoder: Decoder) -> Iterator[Row | Fault]:
    splitter = _Splitter()
    for element in splitter.split(_stretches(file, decoder)):
        yield _check_element(element, behind_array=splitter.is_over and not element.is_closed)
    if not splitter.num_elements:
        yield Fault(0, "file", "holds an empty array")


def _check_element(element: _Element, *, behind_array: bool) -> Row | Fault:
    text = element.text.strip()
    field, reason = "json", ""
    if behind_array:
        reason = "there is text behind the end of the array"
    elif not element.is_closed:
        reason = "the file ends before the array does; the row that begins here is not whole"
    elif element.size > MAX_ROW_BYTES:
        field, reason = "line", f"row has {element.size:,} characters; the limit is {MAX_ROW_BYTES:,}"
    elif not text:
        reason = "there is nothing between two commas"
    elif any("\udc80" <= c <= "\udcff" for c in text):
        field, reason = "encoding", "the row holds bytes that are no text in the file's encoding"
    if not reason:
        return _parse(text, element.line)
    return Fault(element.line, field, reason, text=_shown(text.encode("utf-8", "surrogateescape")))


def _stretches(file: BinaryIO, decoder: Decoder) -> Iterator[str]:
    """Decoded pieces of the file, each ending at a quote, so never inside a character or an escape."""
    held: list[bytes] = []
    while chunk := file.read(_CHUNK_BYTES):
        cut = chunk.rfind(b'"') + 1
        if not cut and len(held) * _CHUNK_BYTES > MAX_ROW_BYTES:
            cut = len(chunk) - chunk.endswith(b"\\")  # a string over the limit: its text will not be used
        if cut:
            yield decoder.decode_damaged(b"".join([*held, chunk[:cut]]))
            held = [chunk[cut:]]
        else:
            held.append(chunk)
    yield decoder.decode_damaged(b"".join(held))


class _Splitter:
    """Cuts the text of one JSON array into its elements, without parsing them.

    Knows strings and brackets only, so a broken element does not hide the next one. A line break inside a string, which
    JSON forbids, ends the string: after a lost quote the cutting is right again from one of the next lines on.
    """

    _MARKS = re.compile(r'\\.|["\[\]{},\n]', re.DOTALL)

    def __init__(self) -> None:
        self.is_over = False  # the array was closed
        self.num_elements = 0
        self._line = 1  # of the first character held
        self._held: list[str] = []
        self._size = 0
        self._num_breaks = 0
        self._depth = 0
        self._in_string = False

    def split(self, stretches: Iterator[str]) -> Iterator[_Element]:
        for text in stretches:
            start = 0
            for mark in self._MARKS.finditer(text):
                border = self._follow(mark.group(), text, mark.start())
                if border:
                    self._hold(text[start : mark.start()])
                    start = mark.end() if mark.group() == border else mark.start()
                    if element := self._take(border):
                        yield element
            self._hold(text[start:])
        rest = self._element(is_closed=False)
        if rest.text.strip() or not self.is_over:
            self.num_elements += 1
            yield rest

    def _follow(self, mark: str, text: str, at: int) -> str:
        """Keep track of strings and brackets; the mark itself when it is a border of elements, else nothing."""
        if self.is_over:
            return ""
        if self._in_string:
            self._in_string = mark not in ('"', "\n")
            return self._mend(text[max(0, at - 100) : at].rstrip()) if mark == "\n" else ""
        if mark == '"':
            self._in_string = True
        elif mark in ("[", "{"):
            self._depth += 1
            return mark if self._depth == 1 else ""
        elif mark in ("]", "}"):
            self._depth -= 1
            self.is_over = self._depth == 0
            return mark if self.is_over else ""
        elif mark == "," and self._depth == 1:
            return mark
        return ""

    def _mend(self, line: str) -> str:
        """A string ran into a line break. If the line looks like the end of an element, its brackets were in there."""
        if line.endswith(("}", "},")) and self._depth > 1:
            self._depth = 1
            return "," if line.endswith(",") else ""
        return ""

    def _hold(self, text: str) -> None:
        self._size += len(text)
        self._num_breaks += text.count("\n")
        self._held.append(text)
        if self._size > MAX_ROW_BYTES:
            self._held = [self._held[0][:_MAX_SHOWN]]  # enough to find the line of its beginning

    def _take(self, border: str) -> _Element | None:
        """The element that a border ends, if there is one."""
        element = self._element(is_closed=True)
        is_empty_array = border == "]" and not self.num_elements and not element.text.strip()
        if border == "[" or is_empty_array:
            return None
        self.num_elements += 1
        return element

    def _element(self, *, is_closed: bool) -> _Element:
        text = "".join(self._held)
        leading = text[: len(text) - len(text.lstrip())].count("\n")
        element = _Element(self._line + leading, text, self._size, is_closed)
        self._line += self._num_breaks
        self._held, self._size, self._num_breaks = [], 0, 0
        return element


# ---- one row


def _parse(text: str, line: int) -> Row | Fault:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        return Fault(line + e.lineno - 1, "json", f"not valid JSON: {e.msg} (column {e.colno})", text=text)
    except _GivenTwice as e:
        return Fault(line, str(e), "given twice in one object; keep one", text=text)
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        return Fault(line, "json", "a number or a nesting too long to read", text=text)
    if not isinstance(value, dict):
        reason = f"a row must be an object {{...}}, not a {type(value).__name__}"
        return Fault(line, "json", reason, text=text)
    return Row(line, value)


class _GivenTwice(Exception):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        raise _GivenTwice(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return row
