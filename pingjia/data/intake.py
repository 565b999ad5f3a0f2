"""Files -> parts on disk: rows are read once, in order, judged in the pool, and what is done stays done."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pingjia
from pingjia.data.files import resolve
from pingjia.data.parts import Part, Parts
from pingjia.data.pool import Pool
from pingjia.data.problems import Finding, OnProblem, Problem
from pingjia.data.record import Inspector, Plan, RawRow
from pingjia.data.rows import Row, read_rows
from pingjia.errors import DataError, StorageError
from pingjia.types import Example

CHUNK_ROWS = 1000
_INPUTS = "inputs.sha256"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a file, or examples that were made, and the number of the part they become."""

    number: int
    rows: tuple[RawRow, ...] = ()
    made: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class InspectChunks:
    """Makes what judges chunks, in whatever process."""

    plan: Plan

    def __call__(self) -> _Judge:
        return _Judge(self.plan.inspector())


class _Judge:
    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector

    def __call__(self, chunk: Chunk) -> tuple[int, Part]:
        records = [record for raw in chunk.rows for record in self._inspector.inspect(raw)]
        records += [record for example in chunk.made for record in self._inspector.inspect_example(example)]
        return chunk.number, Part.of(records)


def take_in(
    files: Iterable[str], plan: Plan, pool: Pool, parts: Parts, *, on_rows: Callable[[int], None], on_note: OnProblem
) -> None:
    """Judge every row of the files into `parts`; parts that are there already are passed over.

    `on_rows(n)`: n more rows are done. Raises DataError for a file that cannot be read.
    """
    store(chunks_of(read_raw(files, on_note)), plan, pool, parts, on_rows=on_rows)


def store(chunks: Iterable[Chunk], plan: Plan, pool: Pool, parts: Parts, *, on_rows: Callable[[int], None]) -> None:
    """Judge chunks into `parts`; parts that are there already are passed over."""

    def missing() -> Iterator[Chunk]:
        for chunk in chunks:
            if parts.has(chunk.number):
                on_rows(len(chunk.rows) + len(chunk.made))
            else:
                yield chunk

    sizes = _Sizes(missing())
    for number, part in pool.map(InspectChunks(plan), iter(sizes)):
        parts.write(number, part)
        on_rows(sizes.of.pop(number))


class _Sizes:
    """Passes chunks on and remembers how many rows each has, until it is done."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self.of: dict[int, int] = {}

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._chunks:
            self.of[chunk.number] = len(chunk.rows) + len(chunk.made)
            yield chunk


def read_raw(files: Iterable[str], on_note: OnProblem) -> Iterator[RawRow]:
    """Every row of the files, sound or not. Raises DataError for a file that cannot be read."""
    for name in files:
        for row in read_rows(resolve(name)):
            where = f"{name}:{row.line}"
            if isinstance(row, Row):
                yield RawRow(where, row.value)
            elif not row.lost:
                on_note(Problem(name, row.line, row.field, row.reason))
            elif row.line == 0:
                raise DataError(f"{name}: {row.field}: {row.reason}")
            else:
                yield RawRow(where, text=row.text, fault=Finding(row.rule, row.field, row.reason))


def chunks_of(rows: Iterable[RawRow], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
    held: list[RawRow] = []
    number = 0
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield Chunk(number, tuple(held))
            held, number = [], number + 1
    if held:
        yield Chunk(number, tuple(held))


def made_chunks(examples: Iterable[Example], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
    """Examples that were made, as chunks."""
    made = iter(examples)
    for number in itertools.count():
        if not (held := tuple(itertools.islice(made, size))):
            return
        yield Chunk(number, made=held)


# ---- what a work directory belongs to


def digest(inputs: dict[str, Any]) -> str:
    """sha256 hex of everything that decides a result, the version of the program included."""
    text = json.dumps({"version": pingjia.__version__, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def belongs(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether the work in `folder` is that of a job with these inputs."""
    try:
        return (folder / _INPUTS).read_text(encoding="utf-8") == digest(inputs)
    except OSError:
        return False


def open_work(folder: Path, inputs: dict[str, Any]) -> None:
    """Make `folder` ready for a job with these inputs. Work of the same job stays; that of any other is removed."""
    if belongs(folder, inputs):
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _INPUTS).write_text(digest(inputs), encoding="utf-8")
    except OSError as e:
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}") from None
