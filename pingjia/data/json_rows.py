"""JSON text -> raw rows with their lines, in constant memory: JSON Lines, or one JSON array of objects.

A row that is no JSON object is reported by line and passed over; nothing ends the reading but the end of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pingjia.data.encoding import Decoder
from pingjia.data.raw import MAX_ROW_BYTES, MAX_SHOWN, Fault, Row, parse_object, shown

_CHUNK_BYTES = 1 << 16

# ---- JSON Lines


def read_lines(file: BinaryIO) -> Iterator[Row | Fault]:
    """One object per line."""
    decoder = Decoder(file)
    for number, (data, size) in enumerate(physical_lines(file), start=1):
        if size > MAX_ROW_BYTES:
            yield too_long(number, size, shown(data[:MAX_SHOWN]))
        elif number == 1 and data.strip() == b"{":
            yield Fault(0, "json", "the object is spread over several lines; write one object per line (JSON Lines)")
            return
        elif not data.isspace():
            yield _read_line(data, number, decoder)
    yield from remarks(decoder)


def remarks(decoder: Decoder) -> Iterator[Fault]:
    """What there is to say about how a file was decoded, once it has been read."""
    if decoder.is_gb:
        yield Fault(0, "encoding", "GBK/GB18030 text, converted while reading; save the file as UTF-8", lost=False)


def _read_line(data: bytes, number: int, decoder: Decoder) -> Row | Fault:
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError as e:
        reason = f"byte {e.start + 1} of the line is no {decoder.encoding} text, which the file is"
        return Fault(number, "encoding", reason, text=shown(data))
    return parse_object(text.strip(), number)


def physical_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, its number of bytes) with line ends; of a line over the limit only the beginning."""
    while data := file.readline(MAX_ROW_BYTES + 1):
        size = len(data)
        if size > MAX_ROW_BYTES and not data.endswith(b"\n"):
            size += _skip_line(file)
        yield data, size


def too_long(line: int, size: int, text: str) -> Fault:
    return Fault(line, "line", f"has {size:,} bytes; the limit is {MAX_ROW_BYTES:,}", text=text)


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


_DAMAGE = re.compile("[\udc80-\udcff]")  # what `decode_damaged` makes of bytes that are no text


def read_array(file: BinaryIO) -> Iterator[Row | Fault]:
    """One array of objects."""
    decoder = Decoder(file)
    splitter = _Splitter()
    for element in splitter.split(_stretches(file, decoder)):
        yield _check_element(element, behind_array=splitter.is_over and not element.is_closed)
    if not splitter.num_elements:
        yield Fault(0, "file", "holds an empty array")
    yield from remarks(decoder)


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
    elif not text.isascii() and _DAMAGE.search(text):
        field, reason = "encoding", "the row holds bytes that are no text in the file's encoding"
    if not reason:
        return parse_object(text, element.line)
    return Fault(element.line, field, reason, text=shown(text.encode("utf-8", "surrogateescape")))


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

    # What has no meaning for the cutting is passed over at once: whole strings too, where they end in the text at hand.
    _INSIDE_STRING = re.compile(r'(?:[^"\\\n]++|\\.)*+', re.DOTALL)
    _BETWEEN_ELEMENTS = re.compile(r'(?:[^"\\\[\]{},]++|\\.|"(?:[^"\\\n]++|\\.)*+")*+', re.DOTALL)
    _INSIDE_ELEMENT = re.compile(r'(?:[^"\\\[\]{}]++|\\.|"(?:[^"\\\n]++|\\.)*+")*+', re.DOTALL)

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
            start, at = 0, self._pass(text, 0)
            while at < len(text):
                if border := self._follow(text[at], text, at):
                    self._hold(text[start:at])
                    start = at + (text[at] == border)
                    if element := self._take(border):
                        yield element
                at = self._pass(text, at + 1)
            self._hold(text[start:])
        rest = self._element(is_closed=False)
        if rest.text.strip() or not self.is_over:
            self.num_elements += 1
            yield rest

    def _pass(self, text: str, at: int) -> int:
        """The place of the next character that may matter."""
        if self.is_over:
            return len(text)
        if self._in_string:
            pattern = self._INSIDE_STRING
        else:
            pattern = self._INSIDE_ELEMENT if self._depth > 1 else self._BETWEEN_ELEMENTS
        found = pattern.match(text, at)
        return found.end() if found else at

    def _follow(self, mark: str, text: str, at: int) -> str:
        """Keep track of strings and brackets; the mark itself when it is a border of elements, else nothing."""
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
            self._held = [self._held[0][:MAX_SHOWN]]  # enough to find the line of its beginning

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
