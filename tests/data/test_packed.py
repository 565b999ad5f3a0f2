"""Gzip around data files: the same rows, and damage that is told."""

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.raw import MAX_ROW_BYTES, Fault, Row
from pingjia.data.rows import read_rows

Write = Callable[..., Path]

ROWS = [{"prompt": f"问题{i}", "response": "答" * i} for i in range(1, 200)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)


def _rows(path: Path) -> list[dict[str, str]]:
    return [item.value for item in read_rows(path) if isinstance(item, Row)]


def _faults(path: Path) -> list[Fault]:
    return [item for item in read_rows(path) if isinstance(item, Fault)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (LINES, "a.jsonl.gz"),
        (LINES, "a.jsonl"),
        (json.dumps(ROWS, ensure_ascii=False), "a.json.gz"),
        (CSV, "a.csv.gz"),
        (CSV, "packed"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk"])
def test_packed_is_read_as_unpacked(write: Write, text: str, name: str, encoding: str) -> None:
    path = write(gzip.compress(text.encode(encoding)), name)
    assert _rows(path) == ROWS
    assert [(f.field, f.lost) for f in _faults(path)] == [("encoding", False)] * (encoding != "utf-8")


def test_gbk_that_begins_late(write: Write) -> None:
    """To tell the encoding the reader looks ahead, and back, at any place."""
    plain = json.dumps({"prompt": "q" * 500, "response": "a"}) + "\n"
    path = write(gzip.compress((plain * 2000 + LINES).encode("gbk")))
    assert _rows(path)[2000:] == ROWS


def test_several_members_and_padding(write: Write) -> None:
    parts = LINES.encode()[:1000], LINES.encode()[1000:]
    assert _rows(write(b"".join(map(gzip.compress, parts)) + bytes(512))) == ROWS


def test_a_truncated_file_gives_what_there_is_and_says_so(write: Write) -> None:
    data = gzip.compress(LINES.encode())
    path = write(data[: len(data) // 2])
    rows, faults = _rows(path), _faults(path)
    assert 0 < len(rows) < len(ROWS)
    assert rows == ROWS[: len(rows)]
    assert [(f.line, f.field) for f in faults] == [(len(rows) + 1, "json"), (0, "file")]
    assert "end before they are whole" in faults[1].reason
    assert json.dumps(ROWS[len(rows)], ensure_ascii=False).startswith(faults[0].text)


def test_a_file_that_lacks_its_checksum_is_truncated(write: Write) -> None:
    path = write(gzip.compress(LINES.encode())[:-3])
    assert _rows(path) == ROWS
    assert ["end before" in f.reason for f in _faults(path)] == [True]


@pytest.mark.parametrize("place", [-5, 200])
def test_damaged_data(write: Write, place: int) -> None:
    data = bytearray(gzip.compress(LINES.encode()))
    data[place] ^= 0xFF
    faults = _faults(write(bytes(data)))
    assert faults[-1].line == 0
    assert "damaged" in faults[-1].reason


def test_rubbish_behind_the_data(write: Write) -> None:
    path = write(gzip.compress(LINES.encode()) + b"rubbish")
    assert _rows(path) == ROWS
    assert ["damaged" in f.reason for f in _faults(path)] == [True]


@pytest.mark.parametrize(
    ("inner", "reason"),
    [(gzip.compress(b"{}"), "twice"), (b"", "is empty"), (b"PAR1" * 10, "Parquet"), (b"PK\x03\x04", "zip")],
)
def test_what_cannot_be_inside(write: Write, inner: bytes, reason: str) -> None:
    faults = _faults(write(gzip.compress(inner)))
    assert [f.line for f in faults] == [0]
    assert reason in faults[0].reason


@given(st.binary(max_size=200))
def test_any_bytes_end_in_faults(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("gz") / "x.jsonl"
    path.write_bytes(b"\x1f\x8b\x08" + data)
    assert all(isinstance(item, Row | Fault) for item in read_rows(path))
    assert _faults(path)[-1].line == 0


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.csv.gz"])
def test_a_bomb_is_named_and_not_held(tmp_path: Path, name: str) -> None:
    """200 MB of one character in 200 KB: one row over the limit."""
    path = tmp_path / name
    packer = zlib.compressobj(wbits=31)
    start = b"prompt,response\na," if "csv" in name else b'{"prompt": "a", "response": "b"}\n{"prompt": "'
    with open(path, "wb") as file:
        file.write(packer.compress(start))
        for _ in range(200):
            file.write(packer.compress(b"x" * (1 << 20)))
        file.write(packer.compress(b"\nc,d\n") + packer.flush())
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    faults = _faults(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (faults[0].line, faults[0].field) == (2, "line")
    assert "209,7" in faults[0].reason
    assert peak < 6 * MAX_ROW_BYTES
