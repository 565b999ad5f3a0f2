"""A table (CSV with commas, semicolons or tabs) -> raw rows with their lines, in constant memory.

The first row names the columns. A row may run over several lines inside quotes; its line is the first one. An empty
cell is a missing field. Columns that hold lists or objects hold them as JSON; `judge_columns` and `parse_cells` are for
other tables too. Not here: Parquet (`parquet_rows.py`).
"""

from __future__ import annotations

import csv
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from pingjia.data.encoding import Decoder
from pingjia.data.json_rows import physical_lines, remarks, too_long
from pingjia.data.layouts import parse_row
from pingjia.data.raw import MAX_ROW_BYTES, MAX_SHOWN, Fault, GivenTwice, Row, parse_json, shown

_JSON_COLUMNS = frozenset(("messages", "conversations", "history", "tools", "images", "facts", "weight"))
_DELIMITERS = ",;\t"
_MAX_ROW_LINES = 100_000  # a lost quote would hold 500 MB of short lines before it came to MAX_ROW_BYTES


# ---- what every table needs


def judge_columns(names: Sequence[str]) -> Fault | None:
    """What makes a table with such columns useless as a whole."""
    twice = [name for name, count in Counter(n for n in names if n).items() if count > 1]
    if twice:
        return Fault(0, "header", f"the column {twice[0]!r} is there twice; rename or remove one")
    parsed = parse_row(dict.fromkeys(filter(None, names)), "")
    if parsed.layout is None:
        reason = parsed.faults[0][1].replace("unknown; keys", "the columns")
        return Fault(0, "header", f"no column holds an answer; {reason}")
    return None


def parse_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the texts of columns that hold JSON parsed. Raises BadCell."""
    return {key: _parse_cell(key, value) if key in _JSON_COLUMNS else value for key, value in row.items()}


class BadCell(Exception):
    """A cell that holds no JSON where it should."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column = column
        self.reason = reason


def _parse_cell(column: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return parse_json(text)
    except json.JSONDecodeError as e:
        raise BadCell(column, f"the cell must hold JSON, and is not valid: {e.msg} (character {e.pos + 1})") from None
    except GivenTwice as e:
        raise BadCell(column, f"the cell's JSON has the key {str(e)!r} twice in one object; keep one") from None
    except (ValueError, RecursionError):
        raise BadCell(column, "the cell's JSON has a number or a nesting too long to read") from None


# ---- CSV


def is_csv(start: bytes) -> bool:
    """Whether a file that begins so is a table by the names of its columns."""
    names = _split_header(start.partition(b"\n")[0].decode("utf-8", "replace"))
    return len(names) > 1 and parse_row(dict.fromkeys(names), "").layout is not None


def read_csv(file: BinaryIO) -> Iterator[Row | Fault]:
    """Rows and faults of a table. A fault in one row hides no other."""
    lines = _Lines(file)
    first = next((line for line in lines if line.text.strip()), None)
    if first is None or first.size > MAX_ROW_BYTES:
        yield Fault(0, "header", f"the first line must name the columns; it has over {MAX_ROW_BYTES:,} bytes")
        return
    names = _split_header(first.text)
    if fault := judge_columns(names):
        yield fault
        return
    if "" in names:
        reason = f"column {names.index('') + 1} has no name; it is not read"
        yield Fault(lines.number, "header", reason, lost=False)
    table = _Table(lines, names, _delimiter(first.text))
    yield from table.rows()
    if not table.num_rows:
        yield Fault(0, "file", "has names of columns and no row")
    yield from remarks(lines.decoder)


def _delimiter(header: str) -> str:
    """The separator that parts most columns."""
    return max(_DELIMITERS, key=lambda d: len(_cells(header, d)))


def _split_header(header: str) -> list[str]:
    return [name.strip() for name in _cells(header, _delimiter(header))]


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])
    except csv.Error:
        return []


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the file. Of one over the limit, `text` is the beginning. `damage`: why it is no text, if so."""

    text: str
    size: int
    damage: str = ""


class _Lines:
    """The decoded lines of a file, which can be given back. `number` is that of the line given last."""

    def __init__(self, file: BinaryIO) -> None:
        self.decoder = Decoder(file, is_table=True)
        self.number = 0
        self._lines = physical_lines(file)
        self._back: deque[_Line] = deque()

    def __iter__(self) -> Iterator[_Line]:
        return self

    def __next__(self) -> _Line:
        line = self._back.popleft() if self._back else self._read(*next(self._lines))
        self.number += 1
        return line

    def give_back(self, lines: Sequence[_Line]) -> None:
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)

    def _read(self, data: bytes, size: int) -> _Line:
        if size > MAX_ROW_BYTES:
            return _Line(shown(data[:MAX_SHOWN]), size)
        try:
            return _Line(self.decoder.decode(data), size)
        except UnicodeDecodeError as e:
            why = f"byte {e.start + 1} of the line is no {self.decoder.encoding} text, which the file is"
            return _Line(data.decode("utf-8", "backslashreplace"), size, why)


class _TooLong(Exception):
    """The lines of one row are over the limit together."""


class _Taken:
    """Feeds lines to the csv module and keeps those that the row at hand is made of."""

    def __init__(self, lines: _Lines) -> None:
        self.lines: list[_Line] = []
        self.is_at_end = False
        self._source = lines
        self._size = 0

    def begin(self) -> None:
        self.lines, self._size, self.is_at_end = [], 0, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._source, None)
        if line is None:
            self.is_at_end = True
            raise StopIteration
        self.lines.append(line)
        self._size += line.size
        if self._size > MAX_ROW_BYTES or len(self.lines) > _MAX_ROW_LINES:
            raise _TooLong
        return line.text

    @property
    def text(self) -> str:
        return "".join(line.text for line in self.lines).rstrip("\r\n")


class _Table:
    """The rows behind a header."""

    def __init__(self, lines: _Lines, names: list[str], delimiter: str) -> None:
        # For the whole process: the csv module knows no other. Its own limit of 131,072 is less than a row may have.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        self.num_rows = 0
        self._lines = lines
        self._names = names
        self._is_behind_damage = False
        self._taken = _Taken(lines)
        self._reader = csv.reader(self._taken, delimiter=delimiter, strict=True)

    def rows(self) -> Iterator[Row | Fault]:
        while True:
            try:
                cells = self._next()
            except StopIteration:
                return
            except csv.Error as e:
                self.num_rows += 1
                yield self._mend(_why(e))
            except _TooLong:
                self.num_rows += 1
                yield self._mend(f"over {MAX_ROW_BYTES:,} bytes or {_MAX_ROW_LINES:,} lines up to the closing quote")
            else:
                if cells:
                    self.num_rows += 1
                    yield self._row(cells)

    def _next(self) -> list[str]:
        self._taken.begin()
        return next(self._reader)

    def _row(self, cells: list[str]) -> Row | Fault:
        line = self._lines.number - len(self._taken.lines) + 1
        field, reason = "", ""
        if damage := next((part.damage for part in self._taken.lines if part.damage), ""):
            field, reason = "encoding", damage
        elif self._is_behind_damage and self._is_torn():
            field, reason = "csv", "looks like the end of the broken row before it"
        elif len(cells) != len(self._names):
            field, reason = "columns", f"has {len(cells)} cells where the header names {len(self._names)} columns"
        elif not any(cells):
            field, reason = "row", "every cell is empty"
        else:
            self._is_behind_damage = False
            try:
                return Row(line, parse_cells({k: v for k, v in zip(self._names, cells, strict=True) if k and v}))
            except BadCell as e:
                field, reason = e.column, e.reason
        return Fault(line, field, reason, text=self._taken.text)

    # A quote that is lost swallows the rows behind it, up to the next quote, where the csv module notices.

    def _mend(self, why: str) -> Fault:
        """The fault of a row that went wrong. When only its first line is to blame, those behind it are read again."""
        taken, self._taken.lines = self._taken.lines, []
        line = self._lines.number - len(taken) + 1
        if len(taken) == 1:
            text = taken[0].text.rstrip("\r\n")
            is_long = taken[0].size > MAX_ROW_BYTES
            return too_long(line, taken[0].size, text) if is_long else Fault(line, "csv", why, text=text)
        self._lines.give_back(taken[1:])
        if self._taken.is_at_end or taken[-1].size > MAX_ROW_BYTES or self._are_rows(len(taken) - 1):
            reason = "a cell begins with a quote that is not closed; close it, or double quotes inside a cell"
            return Fault(line, "csv", reason, text=taken[0].text.rstrip("\r\n"))
        for _ in taken[1:]:
            next(self._lines)
        self._is_behind_damage = True
        return Fault(line, "csv", why, text="".join(part.text for part in taken).rstrip("\r\n"))

    def _is_torn(self) -> bool:
        """Whether the row just taken cannot be whole: its quotes are no pairs. Elsewhere it may be: 3.5" disk."""
        return self._taken.text.count('"') % 2 == 1

    def _are_rows(self, num_lines: int) -> bool:
        """Whether the next lines are rows of their own, for the most part."""
        seen: list[_Line] = []
        sizes: Counter[int] = Counter()
        while len(seen) < num_lines:
            try:
                size = len(self._next())
                sizes[-1 if self._is_torn() else size] += 1
            except (csv.Error, _TooLong, StopIteration):
                sizes[-1] += 1
            seen += self._taken.lines
        self._lines.give_back(seen)
        del sizes[0]  # blank lines say nothing
        return sizes[len(self._names)] * 2 > sizes.total()


def _why(error: csv.Error) -> str:
    text = str(error)
    if "expected after" in text:
        return "a quote inside a cell is not doubled, or text follows the closing quote of a cell"
    if "new-line character" in text:
        return "a carriage return stands outside quotes; save the file with ordinary line ends"
    if "unexpected end" in text:
        return "a cell begins with a quote that is not closed; close it, or double quotes inside a cell"
    return text
