"""Parquet: rows by number, nested values, damage that is told."""

import datetime
import decimal
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.data import Problem, check_files
from pingjia.data.parquet_rows import read_parquet
from pingjia.data.raw import MAX_ROW_BYTES, Fault, Row
from pingjia.data.rows import read_rows
from pingjia.types import Example

pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Write = Callable[..., Path]
Read = Callable[..., tuple[list[Example], list[Problem], list[Problem]]]

PAIRS = {"prompt": ["你好吗？", "b", "c"], "response": ["很好", "e", "f"]}


def _packed(columns: Any, **options: Any) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.parquet", "a", "a.jsonl"])
def test_rows_by_number(write: Write, read: Read, name: str) -> None:
    path = write(_packed({**PAIRS, "domain": ["x", None, ""]}, row_group_size=2), name)
    examples, problems, notes = read(path)
    assert problems == notes == []
    assert [(e.where, e.response, e.domain) for e in examples] == [
        (f"{path}:1", "很好", "x"),
        (f"{path}:2", "e", None),
        (f"{path}:3", "f", None),
    ]


def test_nested_values(write: Write, read: Read) -> None:
    """Parquet gives all objects of a list the same fields; those that are null were never there."""
    turns = [{"role": "user", "content": "几点"}, {"role": "assistant", "content": "九点", "weight": None}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = write(_packed({"messages": [turns, None], "conversations": [None, sharegpt], "facts": [["九点"], None]}))
    examples, problems, _ = read(path)
    assert problems == []
    assert [[m.content for m in e.messages] for e in examples] == [["几点", "九点"], ["q", "a"]]
    assert examples[0].facts == ("九点",)


def test_lists_as_json_text_and_history(write: Write, read: Read) -> None:
    history = [[["a", "b"]], [], None]
    examples, problems, _ = read(write(_packed({**PAIRS, "history": history, "facts": ['["很好"]', None, "[]"]})))
    assert problems == []
    assert [len(e.messages) for e in examples] == [4, 2, 2]
    rows = list(read_rows(write(_packed({**PAIRS, "facts": ["x", "[]", "[]"]}))))
    assert [type(r) for r in rows] == [Fault, Row, Row]
    assert (rows[0].line, rows[0].field) == (1, "facts")


def test_every_type_becomes_what_json_can_hold(write: Write) -> None:
    day = datetime.date(2024, 5, 1)
    columns = {
        "prompt": pa.array(["q"]).dictionary_encode(),
        "response": pa.array([b"\xe4\xbd\xa0"], pa.binary()),
        "day": [day],
        "at": pa.array([1001], pa.timestamp("ns", "UTC")),
        "time": pa.array([1001], pa.time64("ns")),
        "took": pa.array([1001], pa.duration("ns")),
        "price": [decimal.Decimal("1.50")],
        "share": [float("nan")],
        "big": pa.array(["x"], pa.large_string()),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "raw": pa.array([b"\xff"], pa.binary()),
        "nested": [{"d": day, "l": [None, 1.5]}],
    }
    (row,) = read_rows(write(_packed(columns)))
    assert isinstance(row, Row)
    assert json.loads(json.dumps(row.value)) == row.value
    assert row.value["response"] == "你"
    assert row.value["map"] == {"a": 1}
    assert row.value["nested"] == {"d": "2024-05-01", "l": [None, 1.5]}
    assert row.value["price"] == "1.50"
    assert row.value["at"] == "1970-01-01 00:00:00.000001+00:00"
    assert "share" not in row.value


def test_bytes_that_are_no_text(write: Write) -> None:
    bad = pa.array([b"a", b"\xe5\xbe", b"c"], pa.binary()).view(pa.string())
    rows = list(read_rows(write(_packed({"prompt": bad, "response": ["d", "e", "f"]}))))
    assert [type(r) for r in rows] == [Row, Fault, Row]
    assert (rows[1].line, rows[1].field, rows[1].text) == (2, "prompt", "prompt: \\xe5\\xbe, response: e")


def test_binary_in_a_column_that_is_read(write: Write, read: Read) -> None:
    columns = {"prompt": ["a", "b"], "response": pa.array([b"c", b"\xff"], pa.binary())}
    examples, problems, _ = read(write(_packed(columns)))
    assert len(examples) == 1
    assert [(p.line, p.field) for p in problems] == [(2, "response")]


def test_a_key_that_stands_twice_in_a_map(write: Write) -> None:
    twice = pa.array([[("a", 1), ("a", 2)], [("a", 1)]], pa.map_(pa.string(), pa.int64()))
    rows = list(read_rows(write(_packed({"prompt": ["p", "q"], "response": ["r", "s"], "map": twice}))))
    assert [type(r) for r in rows] == [Fault, Row]
    assert (rows[0].line, rows[0].field) == (1, "map")
    assert "p" in rows[0].text


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"PAR1", "file", "cannot be read as Parquet"),
        (b"PAR1" + b"x" * 100 + b"PAR1", "file", "cannot be read as Parquet"),
        (_packed(PAIRS)[:-20], "file", "cannot be read as Parquet"),
        (_packed({"a": [1], "b": [2]}), "header", "the columns are 'a', 'b'"),
        (_packed(pa.table([[1], [2]], names=["prompt", "prompt"])), "header", "twice"),
        (_packed({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), "file", "holds no row"),
        (b"\x00\x01\x02\x03 no parquet", "file", "named .parquet"),
    ],
)
def test_files_that_are_none(write: Write, data: bytes, field: str, reason: str) -> None:
    (fault,) = read_rows(write(data, "a.parquet"))
    assert isinstance(fault, Fault)
    assert (fault.line, fault.field, fault.lost) == (0, field, True)
    assert reason in fault.reason


def test_a_damaged_row_group_costs_its_rows_only(write: Write) -> None:
    num = 3000
    columns = {"prompt": [f"问题{i}" for i in range(num)], "response": [f"答案{i * 7919 % 104729}" for i in range(num)]}
    data = bytearray(_packed(columns, row_group_size=1000, write_page_checksum=True))
    groups = pq.ParquetFile(io.BytesIO(bytes(data))).metadata
    start = groups.row_group(1).column(0).data_page_offset
    data[start + 40 : start + 80] = b"\xff" * 40
    found = list(read_rows(write(bytes(data), "a.parquet")))
    faults = [f for f in found if isinstance(f, Fault)]
    assert [(f.line, f.field) for f in faults] == [(0, "file")]
    assert "rows 1,001 to 2,000 cannot be read" in faults[0].reason
    assert [r.line for r in found if isinstance(r, Row)] == [*range(1, 1001), *range(2001, 3001)]


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_ends_in_rows_and_faults(write: Write, seed: int) -> None:
    data = bytearray(_packed({**PAIRS, "facts": [["x"], [], None]}, write_page_checksum=True))
    rng = random.Random(seed)
    for _ in range(5):
        data[rng.randrange(4, len(data))] = rng.randrange(256)
    found = list(read_rows(write(bytes(data), "a.parquet")))
    assert found
    assert all(isinstance(x, Row | Fault) for x in found)


def test_a_row_over_the_limit_is_named(write: Write) -> None:
    text = "x" * (MAX_ROW_BYTES + 1)
    rows = list(read_rows(write(_packed({"prompt": ["a", text, "b"], "response": ["c", "d", "e"]}))))
    assert [type(r) for r in rows] == [Row, Fault, Row]
    assert (rows[1].line, rows[1].field) == (2, "row")
    assert f"{MAX_ROW_BYTES:,}" in rows[1].reason
    assert len(rows[1].text) == 1000


def test_a_row_group_is_never_held_whole(write: Write) -> None:
    rng = random.Random(7)
    texts = ["".join(rng.choices("abcdefghijklmnop", k=400)) for _ in range(20_000)]
    path = write(_packed({"prompt": texts, "response": texts}, row_group_size=20_000))
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in read_rows(path)) - before
    assert most < path.stat().st_size / 2


def test_without_pyarrow_it_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(_packed(PAIRS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (fault,) = read_parquet(path)
    assert isinstance(fault, Fault)
    assert "pip install 'pingjia[data]'" in fault.reason


def test_check_counts_its_rows(write: Write) -> None:
    report = check_files([write(_packed({"prompt": ["a", ""], "response": ["b", "c"]}))])
    assert (report.num_rows, report.num_examples) == (2, 1)
    assert [(p.line, p.field) for p in report.problems] == [(2, "prompt")]
