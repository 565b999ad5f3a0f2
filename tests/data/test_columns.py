"""Columns in files, read in slices, in single rows and in pieces, against the same columns as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pingjia.data import columns
from pingjia.data.columns import FileColumn, among, at, chunks, gather, numbers, pieces, take


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK", 8)
    monkeypatch.setattr(columns, "PIECE", 10)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 12, (53, 2)).astype("<u8") * np.uint64(0x9E3779B97F4A7C15)


@pytest.fixture
def on_disk(values: np.ndarray, tmp_path: Path) -> FileColumn:
    (tmp_path / "column").write_bytes(values.tobytes())
    return FileColumn(tmp_path / "column", "<u8", 2)


def test_slices_equal_those_of_the_array(values: np.ndarray, on_disk: FileColumn) -> None:
    assert len(on_disk) == 53
    for rows in (slice(0, 5), slice(50, 60), slice(53, 60), slice(7, 3), slice(None)):
        assert on_disk[rows].tolist() == values[rows].tolist()


def test_single_rows_in_any_order(values: np.ndarray, on_disk: FileColumn) -> None:
    rows = np.array([52, 0, 7, 7, 31])
    assert gather(on_disk, rows).tolist() == gather(values, rows).tolist() == values[rows].tolist()
    assert gather(on_disk, rows[:0]).shape == (0, 2)


def test_ascending_rows(values: np.ndarray, on_disk: FileColumn) -> None:
    rows = np.array([0, 7, 8, 15, 52], np.int32)
    assert take(on_disk, rows).tolist() == values[rows].tolist()
    assert take(on_disk, rows[:0]).shape == (0, 2)


def test_chunks_cover_every_row_once() -> None:
    assert [(c.start, c.stop) for c in chunks(20)] == [(0, 8), (8, 16), (16, 20)]
    assert [*chunks(0)] == []


def test_equal_keys_are_in_one_piece_and_every_row_in_one(values: np.ndarray, on_disk: FileColumn) -> None:
    rows = np.flatnonzero(np.arange(53) % 5)
    found = [*pieces(on_disk, rows)]
    assert len(found) == 5  # 42 rows, 10 a piece
    assert sorted(np.concatenate([piece for piece, _ in found]).tolist()) == rows.tolist()
    for piece, keys in found:
        assert piece.tolist() == sorted(piece.tolist())
        assert keys.tolist() == values[piece].tolist()
    firsts = [set(keys[:, 0].tolist()) for _, keys in found]
    assert sum(map(len, firsts)) == len(set().union(*firsts))


def test_no_rows_have_no_pieces(on_disk: FileColumn) -> None:
    assert [*pieces(on_disk, np.zeros(0, np.int32))] == []


def test_numbers_of_a_mask_are_half_as_wide() -> None:
    mask = np.arange(53) % 3 == 0
    rows = numbers(mask)
    assert rows.dtype == np.int32
    assert rows.tolist() == np.flatnonzero(mask).tolist()
    values = np.arange(53) * 2
    assert at(values, rows).tolist() == values[mask].tolist()
    assert among(rows, values > 50).tolist() == [27, 30, 33, 36, 39, 42, 45, 48, 51]
    assert numbers(mask[:0]).tolist() == []
