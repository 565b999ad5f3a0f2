"""Columns of a table that is larger than memory should be: files of fixed-size values, read where they are wanted.

Not mapped: pages of a mapped file count as this process's memory for as long as they are mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 1 << 16  # rows that are looked at together
PIECE = 1 << 16  # rows that are sorted together
MAX_PIECES = 64  # of more rows than that many pieces hold, the pieces are larger: each is a reading of the file


class Column(Protocol):
    """What can be read in slices: an array, or a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class FileColumn:
    """Values of one type, or rows of `width` of them, one after the other in a file that stays as it is."""

    def __init__(self, path: Path, dtype: str, width: int | None = None) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with the last who reads it
        self._dtype, self._width = np.dtype(dtype), width
        self._row_bytes = self._dtype.itemsize * (width or 1)
        self._num_rows = os.fstat(self._file.fileno()).st_size // self._row_bytes

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        """The rows from start to stop; no other step."""
        start, stop, step = rows.indices(self._num_rows)
        assert step == 1, "a column in a file is read forwards"
        return self._shaped(self._read(start, max(0, stop - start)))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Single rows in any order, one small read each."""
        return self._shaped(b"".join([self._read(row, 1) for row in rows.tolist()]))

    def _read(self, row: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count * self._row_bytes, row * self._row_bytes)

    def _shaped(self, data: bytes) -> np.ndarray:
        values = np.frombuffer(data, self._dtype)
        return values if self._width is None else values.reshape(-1, self._width)


def gather(column: Any, rows: np.ndarray) -> np.ndarray:
    """Single rows of an array or of a file, in any order."""
    return column.gather(rows) if isinstance(column, FileColumn) else np.asarray(column[rows])


def chunks(num_rows: int) -> Iterator[slice]:
    """The rows in order, CHUNK at a time."""
    return (slice(start, min(start + CHUNK, num_rows)) for start in range(0, num_rows, CHUNK))


def numbers(mask: np.ndarray) -> np.ndarray:
    """int32: the rows where `mask`. A chunk at a time, as the two below: numpy would widen every number to 8 bytes."""
    found, size = np.empty(int(np.count_nonzero(mask)), np.int32), 0
    for chunk in chunks(len(mask)):
        here = np.flatnonzero(mask[chunk]) + chunk.start
        found[size : size + len(here)] = here
        size += len(here)
    return found


def at(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """values[rows]."""
    found = np.empty(len(rows), values.dtype)
    for chunk in chunks(len(rows)):
        found[chunk] = values[rows[chunk]]
    return found


def among(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Those of `rows` where `mask`."""
    return rows[at(mask, rows)]


def take(column: Column, rows: np.ndarray) -> np.ndarray:
    """The values of `rows`, which ascend."""
    found = [values for _, values in _runs(column, rows)]
    return np.concatenate(found) if found else np.asarray(column[0:0])


def pieces(column: Column, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`rows`, which ascend, in pieces of about PIECE, each with its keys: equal keys are in one piece.

    Keys are hashes: uint64, or rows of them of which the first decides. A file is read once for each piece.
    """
    num_pieces = min(-(-len(rows) // PIECE), MAX_PIECES)
    if num_pieces == 1:
        yield rows, take(column, rows)
        return
    for number in range(num_pieces):
        yield _joined([_of_piece(run, keys, number, num_pieces) for run, keys in _runs(column, rows)])


def _joined(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([rows for rows, _ in found]), np.concatenate([keys for _, keys in found])


def _of_piece(rows: np.ndarray, keys: np.ndarray, number: int, num_pieces: int) -> tuple[np.ndarray, np.ndarray]:
    hashes = keys if keys.ndim == 1 else keys[:, 0]
    is_in = hashes % np.uint64(num_pieces) == number
    return rows[is_in], keys[is_in]


def _runs(column: Column, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their values), a chunk of the column at a time; chunks without any of the rows are not read."""
    for chunk in chunks(len(column)):
        ends = np.array([chunk.start, chunk.stop], rows.dtype)  # of another type, all rows would be converted
        first, last = np.searchsorted(rows, ends)
        if first < last:
            run = rows[first:last]
            yield run, column[chunk][run - chunk.start]
