"""Data files -> examples, row by row, in constant memory. Every row ends up as an example or as a named problem."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pingjia.data.files import resolve
from pingjia.data.layouts import Parsed, parse_row
from pingjia.data.problems import OnProblem, Problem
from pingjia.data.rows import Row, read_rows
from pingjia.types import Example


class Reader:
    """Reads files and keeps count. Problems go to `on_problem`, remarks about rows that are kept to `on_note`."""

    def __init__(self, on_problem: OnProblem, on_note: OnProblem) -> None:
        self.num_rows = 0  # rows met, sound or not
        self._on_problem = on_problem
        self._on_note = on_note

    def read(self, files: Iterable[str | Path]) -> Iterator[tuple[Example, str]]:
        """Each sound row as (example, name of its layout). DataError for a `samples:` name that is not packaged."""
        for name in files:
            yield from self._read_file(str(name), resolve(name))

    def _read_file(self, name: str, path: Path) -> Iterator[tuple[Example, str]]:
        unread: dict[str, int] = {}
        for row in read_rows(path):
            if not isinstance(row, Row):
                self.num_rows += row.lost and row.line > 0
                tell = self._on_problem if row.lost else self._on_note
                tell(Problem(name, row.line, row.field, row.reason, row.rule if row.lost else ""))
                continue
            self.num_rows += 1
            parsed = parse_row(row.value, f"{name}:{row.line}")
            self._tell(name, row.line, parsed, unread)
            if parsed.example is not None and parsed.layout is not None:
                yield parsed.example, parsed.layout

    def _tell(self, name: str, line: int, parsed: Parsed, unread: dict[str, int]) -> None:
        for field, reason in parsed.faults:
            self._on_problem(Problem(name, line, field, reason, "row"))
        for key in parsed.unread:
            if key not in unread:  # once per file is enough
                unread[key] = line
                self._on_note(Problem(name, line, key, "this key is not read"))


def read_examples(
    files: Iterable[str | Path],
    *,
    domains: Collection[str] | None = None,
    max_samples: int | None = None,
    on_problem: OnProblem,
    on_note: OnProblem | None = None,
) -> Iterator[Example]:
    """Yield the sound rows of `files` in order; of `domains` only, if given, and the first `max_samples` at most.

    `on_problem` is told of every row that is lost and why (also of a missing or empty file, as line 0), `on_note` of
    what was put right or passed over in rows that are kept: a byte order mark, GBK, a key that is not read. A row
    without a domain belongs to none. Raises DataError for a `samples:` name that is not packaged.
    """
    num_left = max_samples
    for example, _ in Reader(on_problem, on_note or _ignore).read(files):
        if num_left == 0:
            return
        if domains is not None and example.domain not in domains:
            continue
        yield example
        if num_left is not None:
            num_left -= 1
            if num_left == 0:
                return


def _ignore(_: Problem) -> None:
    """The caller does not want remarks."""
