"""CSV: separators, quotes, line numbers, encodings, and one fault per bad row."""

import csv
import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data import Problem
from pingjia.data.raw import MAX_ROW_BYTES, Fault, Row
from pingjia.data.rows import read_rows
from pingjia.types import Example

Write = Callable[..., Path]
Read = Callable[..., tuple[list[Example], list[Problem], list[Problem]]]

HEADER = "prompt,response\n"


def _found(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, Fault]]:
    rows: dict[int, dict[str, Any]] = {}
    faults: dict[int, Fault] = {}
    for item in read_rows(path):
        if isinstance(item, Row):
            rows[item.line] = item.value
        else:
            assert item.line not in faults
            faults[item.line] = item
    return rows, faults


# ---- sound tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_table_is_its_contents_tell(write: Write, read: Read, delimiter: str, name: str, end: str) -> None:
    lines = [("prompt", "response", "domain"), ("你好，吗？", "很好", "chat"), ("b", "c", "")]
    path = write(end.join(delimiter.join(cells) for cells in lines) + end, name)
    examples, problems, notes = read(path)
    assert problems == notes == []
    assert [(e.where, e.prompt[0].content, e.response, e.domain) for e in examples] == [
        (f"{path}:2", "你好，吗？", "很好", "chat"),
        (f"{path}:3", "b", "c", None),
    ]


def test_a_file_named_csv_that_is_json_lines(write: Write, read: Read) -> None:
    assert len(read(write([{"prompt": "a", "response": "b"}], "a.csv"))[0]) == 1


def test_line_of_a_row_is_its_first_line(write: Write) -> None:
    path = write(HEADER + '"a\nb",c\n\n"d, ""e""","f\r\n\n\ng"\nlast,one', "a.csv")
    rows, faults = _found(path)
    assert faults == {}
    assert rows == {
        2: {"prompt": "a\nb", "response": "c"},
        5: {"prompt": 'd, "e"', "response": "f\r\n\n\ng"},
        9: {"prompt": "last", "response": "one"},
    }


def test_cells_with_json(write: Write, read: Read) -> None:
    turns = [{"role": "user", "content": 'a,\n"b"'}, {"role": "assistant", "content": "九点"}]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["messages", "facts", "domain"])
    writer.writerow([json.dumps(turns, ensure_ascii=False, indent=1), '["九点"]', "x"])
    writer.writerow([json.dumps(turns), "", ""])
    path = write(out.getvalue(), "a.csv")
    examples, problems, _ = read(path)
    assert problems == []
    assert [(m.role, m.content) for m in examples[0].messages] == [("user", 'a,\n"b"'), ("assistant", "九点")]
    assert [e.facts for e in examples] == [("九点",), ()]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("[九点]", "not valid"),
        ('"[1"', "not valid"),
        ('"{""a"": 1, ""a"": 2}"', "'a' twice"),
        ("9" * 5000, "too long to read"),
        ("[" * 100_000, "too long to read"),
    ],
)
def test_a_bad_cell_is_a_fault_of_its_row(write: Write, cell: str, reason: str) -> None:
    path = write(f"prompt,response,facts\na,b,\nc,d,{cell}\ne,f,[]\n", "a.csv")
    rows, faults = _found(path)
    assert sorted(rows) == [2, 4]
    assert [(f.line, f.field) for f in faults.values()] == [(3, "facts")]
    assert reason in faults[3].reason
    assert faults[3].text == f"c,d,{cell}"


CELL = st.text(st.sampled_from('ab你,;\t"\n\r 😀\x85\u2028'), min_size=1, max_size=6).filter(str.strip)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8), st.sampled_from(",;\t"), st.booleans())
def test_any_table_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], delimiter: str, quote_all: bool
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        has_returns = any("\r" in text for row in cells for text in row)  # which the writer forgets to quote
        quoting = csv.QUOTE_ALL if quote_all or has_returns else csv.QUOTE_MINIMAL
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator="\n")
        writer.writerows([("prompt", "response"), *cells])
    rows, faults = _found(path)
    assert faults == {}
    assert [(r["prompt"], r["response"]) for r in rows.values()] == cells
    lines = path.read_bytes().split(b"\n")
    starts = [sum(a.count("\n") + b.count("\n") + 1 for a, b in cells[:i]) + 2 for i in range(len(cells))]
    assert list(rows) == starts
    assert len(lines) == starts[-1] + cells[-1][0].count("\n") + cells[-1][1].count("\n") + 1


@given(st.binary(max_size=200) | st.text(st.sampled_from('ab,"\n\r\0你'), max_size=80).map(str.encode))
def test_any_bytes_end_in_rows_and_faults(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.csv"
    path.write_bytes(HEADER.encode() + data)
    found = list(read_rows(path))
    assert found
    text = data.decode("utf-8", "backslashreplace")
    if not any(isinstance(f, Fault) and f.line == 0 for f in found):
        assert sum(f.line > 1 for f in found) >= bool(text.strip())


@given(st.lists(st.sampled_from(["a,b", "c,d", '"e","f"', '"g\nh",i', '"j,k', 'l,"m', "n,o,p", "q"]), max_size=12))
def test_sound_rows_beside_bad_ones_are_never_changed(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str]
) -> None:
    """Every line is in a row or in the text of a fault, whatever is broken around it."""
    path = tmp_path_factory.mktemp("mix") / "x.csv"
    path.write_text(HEADER + "z,z\n" + "".join(row + "\n" for row in rows), encoding="utf-8")
    covered = 0
    for item in read_rows(path):
        text = item.text if isinstance(item, Fault) else "\n".join(item.value.values())
        assert item.line == covered + 2
        covered += text.count("\n") + 1 - (isinstance(item, Row) and len(item.value) - 1)
    assert covered == 1 + sum(row.count("\n") + 1 for row in rows)


# ---- encodings


@pytest.mark.parametrize("num_ascii", [0, 3])
def test_gbk(write: Write, read: Read, num_ascii: int) -> None:
    text = HEADER + "q,a\n" * num_ascii + "你们几点开门,每天上午九点\n中国人民银行,鎴涓\n"
    examples, problems, notes = read(write(text.encode("gbk"), "a.csv"))
    assert problems == []
    assert [e.prompt[0].content for e in examples[num_ascii:]] == ["你们几点开门", "中国人民银行"]
    assert [n.field for n in notes] == ["encoding"]
    assert "GBK" in notes[0].reason


def test_a_large_gbk_table_without_a_quote(write: Write) -> None:
    rows, faults = _found(write((HEADER + "你们几点开门,每天上午九点\n" * 20_000).encode("gbk"), "a.csv"))
    assert len(rows) == 20_000
    assert {fault.lost for fault in faults.values()} == {False}


def test_byte_order_mark_is_no_part_of_the_first_name(write: Write, read: Read) -> None:
    examples, problems, notes = read(write(b"\xef\xbb\xbf" + (HEADER + "a,b\n").encode(), "a.csv"))
    assert (len(examples), problems, [n.line for n in notes]) == (1, [], [1])


def test_bytes_that_are_no_text(write: Write) -> None:
    path = write(HEADER.encode() + '你,好\n"a\n'.encode() + b'\xff",b\nc,d\n', "a.csv")
    rows, faults = _found(path)
    assert sorted(rows) == [2, 5]
    assert (faults[3].field, faults[3].text) == ("encoding", '"a\n\\xff",b')
    assert "no UTF-8 text" in faults[3].reason


def test_nul_and_half_an_emoji(write: Write, read: Read) -> None:
    path = write(HEADER + "a\0b,c\nd,e\n" + 'f,"g"\n', "a.csv")
    _, problems, _ = read(path)
    assert [(p.line, p.field) for p in problems] == [(2, "prompt")]
    assert "NUL" in problems[0].reason
    turns = json.dumps('[["a", "\\ud83d"]]').replace('\\"', '""')
    path = write(f"prompt,response,history\na,b,{turns}\n".replace("\\\\", "\\"), "b.csv")
    _, problems, _ = read(path)
    assert [(p.line, p.field) for p in problems] == [(2, "history[0][1]")]
    assert "surrogate" in problems[0].reason


def test_utf16_is_named(write: Write, read: Read) -> None:
    _, problems, _ = read(write((HEADER + "a,b\n").encode("utf-16"), "a.csv"))
    assert [(p.line, p.field) for p in problems] == [(0, "encoding")]


# ---- bad rows


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ("a,b,c", "columns", "3 cells where the header names 2"),
        ("a", "columns", "1 cells where"),
        ('"a"b,c', "csv", "not doubled"),
        ('"a,b', "csv", "not closed"),
        ('a,"b', "csv", "not closed"),
        ("a\rb,c", "csv", "carriage return"),
        (",", "row", "every cell is empty"),
    ],
)
def test_a_bad_row_hides_no_other(write: Write, row: str, field: str, reason: str) -> None:
    for before, after in (("x,y", "z,w"), ('"x","y"', '"z","w"'), ('"x\n1","y"', '"z","w\n1"')):
        path = write(f"{HEADER}{before}\n{row}\n{after}\n{after}\n", "a.csv")
        rows, faults = _found(path)
        line = 3 + before.count("\n")
        next_line = line + 1 + after.count("\n")
        assert sorted(rows) == [2, line + 1, next_line + 1]
        assert [(f.line, f.field, f.text) for f in faults.values()] == [(line, field, row)]
        assert reason in faults[line].reason


def test_an_open_quote_at_the_end(write: Write) -> None:
    rows, faults = _found(write(HEADER + 'a,b\n"c,d\ne,f\ng,h', "a.csv"))
    assert sorted(rows) == [2, 4, 5]
    assert (faults[3].text, list(faults)) == ('"c,d', [3])


def test_bad_rows_behind_an_open_quote_are_told_one_by_one(write: Write) -> None:
    rows, faults = _found(write(HEADER + 'a,b\n"c,d\ne\nf\ng,h\n', "a.csv"))
    assert sorted(rows) == [2, 6]
    assert {line: fault.text for line, fault in faults.items()} == {3: '"c,d', 4: "e", 5: "f"}


def test_blank_lines_behind_an_open_quote_say_nothing(write: Write) -> None:
    rows, faults = _found(write(HEADER + '"c,d\n\n\n\n"e","f"\n', "a.csv"))
    assert rows == {6: {"prompt": "e", "response": "f"}}
    assert {line: fault.text for line, fault in faults.items()} == {2: '"c,d'}


def test_text_of_several_lines_with_a_wrong_quote_becomes_no_row(write: Write) -> None:
    bad = '"Dear all,\nthis is "quoted"\nend",b'
    rows, faults = _found(write(f"{HEADER}a,b\n{bad}\nc,d\n", "a.csv"))
    assert sorted(rows) == [2, 6]
    assert {line: fault.text for line, fault in faults.items()} == {3: '"Dear all,\nthis is "quoted"', 5: 'end",b'}


def test_a_quote_inside_a_cell_that_is_not_quoted_is_a_character(write: Write) -> None:
    rows, faults = _found(write(HEADER + '3.5" disk,c\n', "a.csv"))
    assert (rows, faults) == ({2: {"prompt": '3.5" disk', "response": "c"}}, {})


def test_missing_cells_are_missing_fields(write: Write, read: Read) -> None:
    _, problems, _ = read(write("prompt,response,system\na,,\n", "a.csv"))
    assert [str(p).partition(":2: ")[2] for p in problems] == ["response: missing"]


# ---- bad headers


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("prompt,response,prompt\na,b,c\n", "header", "'prompt' is there twice"),
        ("frage,antwort\na,b\n", "header", "no column holds an answer; the columns are 'frage', 'antwort'"),
        ("promt,respons\na,b\n", "header", "did you mean"),
        (",\na,b\n", "header", "no column"),
        (HEADER, "file", "no row"),
        (HEADER + "\n\n", "file", "no row"),
        ("", "file", "is empty"),
    ],
)
def test_tables_that_are_none(write: Write, text: str, field: str, reason: str) -> None:
    rows, faults = _found(write(text, "a.csv"))
    assert rows == {}
    assert [(f.line, f.field, f.lost) for f in faults.values()] == [(0, field, True)]
    assert reason in faults[0].reason


def test_a_column_without_a_name_is_noted(write: Write, read: Read) -> None:
    """pandas writes its index so."""
    examples, problems, notes = read(write(",prompt,response\n0,a,b\n1,c,d\n", "a.csv"))
    assert (len(examples), problems) == (2, [])
    assert [(n.line, n.field) for n in notes] == [(1, "header")]


def test_columns_that_are_not_read_are_noted(write: Write, read: Read) -> None:
    _, problems, notes = read(write("id,prompt,response\n0,a,b\n1,c,d\n", "a.csv"))
    assert problems == []
    assert [(n.line, n.field) for n in notes] == [(2, "id")]


# ---- size


def test_a_row_over_the_limit_is_named_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    with open(path, "wb") as file:
        file.write(b"prompt,response\na,b\nc,")
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'\n"d,e\n')
        for _ in range(40_000):
            file.write(b"f," + b"y" * 1000 + b"\n")
    tracemalloc.start()
    num_rows = 0
    faults = []
    for item in read_rows(path):
        num_rows += isinstance(item, Row)
        if isinstance(item, Fault):
            faults.append(item)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(f.line, f.field) for f in faults] == [(3, "line"), (4, "csv")]
    assert "52,428,8" in faults[0].reason
    assert num_rows == 1 + 40_000
    assert peak < 6 * MAX_ROW_BYTES


def test_a_lost_quote_holds_no_million_short_lines(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pingjia.data.csv_rows._MAX_ROW_LINES", 1000)
    path = write(HEADER + '"a,b\n' + "c,d\n" * 40_000 + '"e,f\n', "a.csv")
    tracemalloc.start()
    counts = Counter(type(item) for item in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {Row: 40_000, Fault: 2}
    assert peak < 2_000_000


def test_cells_may_be_as_long_as_rows(write: Write) -> None:
    rows, faults = _found(write(HEADER + "a," + "b" * 1_000_000 + "\n", "a.csv"))
    assert (len(rows), faults) == (1, {})
