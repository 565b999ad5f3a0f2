"""Files -> rows: broken lines, encodings, arrays, sizes; every row is an example or a named problem."""

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data import Problem, read_examples
from pingjia.data.rows import MAX_ROW_BYTES, Fault, Row, read_rows
from pingjia.errors import DataError
from pingjia.types import Example

Write = Callable[..., Path]
Read = Callable[..., tuple[list[Example], list[Problem], list[Problem]]]

ROW = {"prompt": "你好吗？", "response": "我很好，谢谢。"}
LINE = json.dumps(ROW, ensure_ascii=False)


def _lines(problems: list[Problem]) -> list[int]:
    return [p.line for p in problems]


# ---- JSON Lines


def test_rows_and_where(write: Write, read: Read) -> None:
    path = write([ROW, {**ROW, "prompt": "第二"}])
    examples, problems, notes = read(path)
    assert [e.where for e in examples] == [f"{path}:1", f"{path}:2"]
    assert [e.prompt[0].content for e in examples] == ["你好吗？", "第二"]
    assert problems == notes == []


def test_a_broken_line_hides_no_other(write: Write, read: Read) -> None:
    path = write(f'{LINE}\n{{"prompt": "x", \n[1]\n"text"\n\n{LINE}\nnull\n{LINE}')
    examples, problems, _ = read(path)
    assert [e.where for e in examples] == [f"{path}:{n}" for n in (1, 6, 8)]
    assert _lines(problems) == [2, 3, 4, 7]
    assert str(problems[0]).startswith(f"{path}:2: json: not valid JSON: ")
    assert str(problems[1]) == f"{path}:3: json: a row must be an object {{...}}, not a list"


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ('{"prompt": "a", "prompt": "b", "response": "c"}', "prompt", "given twice"),
        ('{"prompt": "a", "response": {"x": 1, "x": 2}}', "x", "given twice"),
        ("[" * 100_000, "json", "nesting too long"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "json", "too long to read"),
        ('{"prompt": "a\0b", "response": "c"}', "json", "not valid JSON"),
        ('{"prompt": "a\\u0000b", "response": "c"}', "prompt", "NUL"),
        ('{"prompt": "a\\ud83db", "response": "c"}', "prompt", "surrogate"),
        ("{'prompt': 'a'}", "json", "not valid JSON"),
    ],
)
def test_lines_that_are_no_row(write: Write, read: Read, line: str, field: str, reason: str) -> None:
    path = write(f"{LINE}\n{line}\n{LINE}\n")
    examples, problems, _ = read(path)
    assert len(examples) == 2
    assert [(p.line, p.field) for p in problems] == [(2, field)]
    assert reason in problems[0].reason


def test_windows_line_ends(write: Write, read: Read) -> None:
    examples, problems, _ = read(write(f"{LINE}\r\n\r\n{LINE}\r\n"))
    assert [e.where.rpartition(":")[2] for e in examples] == ["1", "3"]
    assert problems == []


def test_line_separators_of_unicode_do_not_part_lines(write: Write, read: Read) -> None:
    row = {"prompt": "a\u2028b\x85c", "response": "d"}
    examples, problems, _ = read(write([row, ROW]))
    assert [e.prompt[0].content for e in examples] == ["a\u2028b\x85c", ROW["prompt"]]
    assert problems == []


def test_an_object_over_several_lines_is_said_once(write: Write, read: Read) -> None:
    examples, problems, _ = read(write(json.dumps(ROW, indent=2)))
    assert examples == []
    assert len(problems) == 1
    assert "one object per line" in problems[0].reason


# ---- files that are none


def test_missing_empty_directory(tmp_path: Path, write: Write, read: Read) -> None:
    missing, empty, blank = tmp_path / "no.jsonl", write("", "empty.jsonl"), write(" \n\n", "blank.jsonl")
    examples, problems, _ = read(missing, empty, blank, tmp_path, write([ROW]))
    assert len(examples) == 1  # a bad file does not hide a good one
    assert _lines(problems) == [0, 0, 0, 0]
    reasons = [p.reason for p in problems]
    assert "no such file" in reasons[0]
    assert "is empty" in reasons[1]
    assert "is empty" in reasons[2]
    assert "directory" in reasons[3]
    assert str(problems[0]) == f"{missing}:0: file: no such file"


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"PK\x03\x04....", "file", "save the sheet as CSV"),
        (b"BZh91AY", "file", "bzip2"),
        (b"\xfd7zXZ\0", "file", "xz"),
        (b"\x28\xb5\x2f\xfd..", "file", "zstd"),
        (b"ARROW1\0\0", "file", "save it as Parquet"),
        (bytes(4096) + LINE.encode(), "file", "NUL bytes"),
    ],
)
def test_files_of_another_kind_are_told_by_their_contents(
    write: Write, read: Read, data: bytes, field: str, reason: str
) -> None:
    examples, problems, _ = read(write(data))
    assert examples == []
    assert [(p.line, p.field) for p in problems] == [(0, field)]
    assert reason in problems[0].reason


def test_nul_bytes_between_rows_hide_none(write: Write, read: Read) -> None:
    """As a crash leaves them in a file that was appended to."""
    path = write(LINE.encode() + b"\n" + bytes(100) + b"\n" + LINE.encode())
    examples, problems, _ = read(path)
    assert [e.where[-1] for e in examples] == ["1", "3"]
    assert [(p.line, p.field) for p in problems] == [(2, "json")]


def test_what_is_no_regular_file(tmp_path: Path, read: Read) -> None:
    os.mkfifo(tmp_path / "pipe")  # would block for ever
    _, problems, _ = read(tmp_path / "pipe", "/dev/null", "a\0b")
    assert [(p.line, p.field) for p in problems] == [(0, "file")] * 3
    assert ["pipe or a device" in p.reason for p in problems] == [True, True, False]
    assert "no such file" in problems[2].reason


# ---- files that change


def _append(path: Path) -> None:
    with open(path, "a") as file:
        file.write("\n" + LINE)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_append, r"changed \(from 3,499 to 3,563 bytes\)"),
        (_cut, r"changed \(from 3,499 to 1,749 bytes\)"),
        (_replace, "was replaced by another"),
        (_touch, "changed while"),
        (Path.unlink, "was removed"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_changes_while_it_is_read(
    write: Write, change: Callable[[Path], None], reason: str, packed: bool
) -> None:
    data = "\n".join([LINE] * 63).ljust(3499).encode()[:3499]
    path = write(gzip.compress(data) if packed else data)
    reader = read_rows(path)
    assert isinstance(next(reader), Row)
    change(path)
    last = list(reader)[-1]
    assert isinstance(last, Fault)
    assert (last.line, last.field, last.lost) == (0, "file", True)
    assert re.search(reason.split(r" \(")[0] if packed else reason, last.reason)
    assert "while it was read" in last.reason


def test_a_file_that_is_only_read_in_part_is_not_complained_of(write: Write) -> None:
    path = write([ROW] * 3)
    problems: list[Problem] = []
    for _ in read_examples([path], max_samples=1, on_problem=problems.append):
        _touch(path)
    assert problems == []


def test_only_a_byte_order_mark(write: Write, read: Read) -> None:
    examples, problems, _ = read(write(b"\xef\xbb\xbf"))
    assert examples == []
    assert "is empty" in problems[0].reason


# ---- encodings


def test_byte_order_mark_is_passed_over_with_a_note(write: Write, read: Read) -> None:
    path = write(b"\xef\xbb\xbf" + f"{LINE}\n{LINE}\n".encode())
    examples, problems, notes = read(path)
    assert [e.prompt[0].content for e in examples] == ["你好吗？"] * 2
    assert problems == []
    assert [(n.line, n.field) for n in notes] == [(1, "encoding")]
    assert "BOM" in notes[0].reason


@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("num_ascii", [0, 3])
def test_gbk_is_converted_with_a_note(write: Write, read: Read, encoding: str, as_array: bool, num_ascii: int) -> None:
    plain = [{"prompt": "q", "response": "a"}] * num_ascii
    rows = [*plain, ROW, {**ROW, "prompt": "中国人民银行，鎴涓{}[]，\\"}]  # with 0x5C and brackets as second bytes
    text = (
        json.dumps(rows, ensure_ascii=False) if as_array else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    )
    examples, problems, notes = read(write(text.encode(encoding)))
    assert problems == []
    assert [e.prompt[0].content for e in examples] == [r["prompt"] for r in rows]
    assert [n.field for n in notes] == ["encoding"]
    assert "GBK" in notes[0].reason


@pytest.mark.parametrize("as_array", [False, True])
def test_damage_in_a_utf8_file_is_named_and_hides_nothing(write: Write, read: Read, as_array: bool) -> None:
    good = LINE.encode()
    bad = good.replace("很".encode(), b"\xe5\xbe")
    data = b"[" + b",\n".join([good, bad, good]) + b"]" if as_array else b"\n".join([good, bad, good])
    examples, problems, notes = read(write(data))
    assert len(examples) == 2
    assert [(p.line, p.field) for p in problems] == [(2, "encoding")]
    assert notes == []


def test_damage_in_the_first_line_of_a_utf8_file(write: Write, read: Read) -> None:
    """Its bytes could be GB18030; the lines after it say they are not."""
    bad = LINE.encode().replace("很".encode(), b"\xe5\xbe")
    examples, problems, _ = read(write(b"\n".join([bad, LINE.encode(), LINE.encode()])))
    assert len(examples) == 2
    assert [(p.line, p.field) for p in problems] == [(1, "encoding")]


def test_bytes_that_are_no_text(write: Write, read: Read) -> None:
    data = b'{"prompt": "a\xff\xff", "response": "b"}\n' + LINE.encode()
    examples, problems, _ = read(write(data))
    assert len(examples) == 1
    assert problems[0].line == 1
    assert problems[0].field == "encoding"


def test_utf16_is_named(write: Write, read: Read) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        examples, problems, _ = read(write(LINE.encode(encoding)))
        assert examples == []
        assert "UTF-16" in problems[0].reason
        assert len(problems) == 1


@given(
    st.lists(st.text(st.characters(codec="gbk", min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=4), min_size=1)
)
def test_any_gbk_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    rows = [{"prompt": text, "response": "我们的答案"} for text in texts]
    path = tmp_path_factory.mktemp("gbk") / "x.jsonl"
    path.write_bytes("\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode("gbk"))
    problems: list[Problem] = []
    examples = list(read_examples([path], on_problem=problems.append))
    assert problems == []
    assert [e.prompt[0].content for e in examples] == texts


# ---- one array


def _array(*rows: Any, indent: int | None = 2) -> str:
    return json.dumps(list(rows), ensure_ascii=False, indent=indent)


@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_rows(write: Write, read: Read, indent: int | None) -> None:
    tricky = {"prompt": '],{"a": "\\', "response": 'x\\" } ] ,\n"'}
    path = write(_array(ROW, tricky, ROW, indent=indent), "data.json")
    examples, problems, _ = read(path)
    assert problems == []
    assert [e.prompt[0].content for e in examples] == [ROW["prompt"], tricky["prompt"], ROW["prompt"]]
    lines = [1, 1, 1] if indent is None else [2, 6, 10]
    assert [e.where for e in examples] == [f"{path}:{n}" for n in lines]


def test_broken_elements_hide_no_others(write: Write, read: Read) -> None:
    text = f'[\n{LINE},\n{{"prompt": "x",, }},\n5,\n\n,\n{{"prompt": "no quote, "response": "y"}},\n{LINE}\n]\n'
    examples, problems, _ = read(write(text))
    assert [e.where.rpartition(":")[2] for e in examples] == ["2", "8"]
    assert _lines(problems) == [3, 4, 6, 7]


def test_the_line_of_an_error_inside_an_element(write: Write, read: Read) -> None:
    path = write('[\n{\n"prompt": "x",\n"response": oops\n}\n]')
    _, problems, _ = read(path)
    assert [(p.line, p.field) for p in problems] == [(4, "json")]


@pytest.mark.parametrize(
    ("text", "num", "reason"),
    [
        ("[]", 0, "empty array"),
        (" [ ] \n", 0, "empty array"),
        ("[" + LINE, 0, "ends before the array does"),
        ("[" + LINE + ",", 1, "ends before the array does"),
        ("[" + LINE + ', {"prompt": "cut of', 1, "ends before the array does"),
        ("[" + LINE + "] trailing", 1, "behind the end of the array"),
        ("[" + LINE + "]\n[" + LINE + "]", 1, "behind the end of the array"),
        ("[" + LINE + ",]", 1, "nothing between two commas"),
        ("[", 0, "ends before the array does"),
    ],
)
def test_arrays_that_are_not_whole(write: Write, read: Read, text: str, num: int, reason: str) -> None:
    examples, problems, _ = read(write(text))
    assert len(examples) == num
    assert len(problems) == 1
    assert reason in problems[0].reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(), VALUES), min_size=1), st.sampled_from([None, 0, 3]), st.booleans())
def test_any_array_is_read_as_json_does(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    found = list(read_rows(path))
    assert [r.value for r in found if isinstance(r, Row)] == rows


@given(st.binary(max_size=200) | st.text(st.sampled_from('[]{},":\\ \nab你'), max_size=80).map(str.encode))
def test_any_bytes_end_in_rows_and_faults(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.jsonl"
    path.write_bytes(data)
    found = list(read_rows(path))
    assert found
    assert all(isinstance(x, Row | Fault) for x in found)
    path.write_bytes(b"[" + data)
    assert list(read_rows(path))


def test_chunks_of_any_size_give_the_same(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f'你好{i}\\"', "response": "x" * i + "😀"} for i in range(40)]
    path = write(_array(*rows), "data.json")
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr("pingjia.data.json_rows._CHUNK_BYTES", size)
        assert [r.value for r in read_rows(path) if isinstance(r, Row)] == rows


# ---- size


def _peak_bytes(path: Path) -> tuple[int, list[Row | Fault]]:
    tracemalloc.start()
    try:
        found = list(read_rows(path))
        return tracemalloc.get_traced_memory()[1], found
    finally:
        tracemalloc.stop()


def test_rows_of_the_longest_size_hide_none(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pingjia.data.json_rows.MAX_ROW_BYTES", 100)
    rows = [{"n": "x" * (size - len('{"n": ""}'))} for size in range(95, 106)]
    found = list(read_rows(write(rows)))
    assert [r.line for r in found] == list(range(1, 12))
    assert [r.value for r in found if isinstance(r, Row)] == [r for r in rows if len(json.dumps(r)) < 100]


@pytest.mark.parametrize("as_array", [False, True])
def test_a_line_of_100_megabytes_is_named_and_not_held(tmp_path: Path, as_array: bool) -> None:
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        file.write(b"[" if as_array else b"")
        file.write(LINE.encode() + (b",\n" if as_array else b"\n"))
        file.write(b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'", "response": "y"}' + (b",\n" if as_array else b"\n"))
        file.write(LINE.encode() + (b"]" if as_array else b"\n"))
    peak, found = _peak_bytes(path)
    assert [type(x) for x in found] == [Row, Fault, Row]
    assert isinstance(found[1], Fault)
    assert (found[1].line, found[1].field) == (2, "line")
    assert "104,8" in found[1].reason
    assert f"{MAX_ROW_BYTES:,}" in found[1].reason
    assert peak < 6 * MAX_ROW_BYTES


def test_many_rows_take_no_more_memory_than_few(write: Write) -> None:
    def peak(num: int, kind: str) -> int:
        line = '"a, ""b""\nc",d'
        text = {"array": f"[{','.join([LINE] * num)}]", "csv": "prompt,response\n" + f"{line}\n" * num}
        data = text.get(kind, f"{LINE}\n" * num).encode()
        path = write(gzip.compress(data) if kind == "gz" else data, "many")
        tracemalloc.start()
        count = sum(isinstance(r, Row) for r in read_rows(path))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num
        return top

    for kind in ("lines", "array", "csv", "gz"):
        assert peak(60_000, kind) < 1.2 * peak(20_000, kind) + 100_000


def test_reading_is_lazy(write: Write) -> None:
    path = write([ROW] * 3 + [{"prompt": ""}])
    problems: list[Problem] = []
    first = next(iter(read_examples([path], on_problem=problems.append)))
    assert first.where == f"{path}:1"
    assert problems == []


# ---- choosing rows


def test_domains_and_max_samples(write: Write, read: Read) -> None:
    path = write([{**ROW, "domain": d} if d else ROW for d in ("a", "b", None, "a", "b")])
    assert [e.where[-1] for e in read(path, domains=["a"])[0]] == ["1", "4"]
    assert [e.where[-1] for e in read(path, domains=["a", "b"], max_samples=3)[0]] == ["1", "2", "4"]
    assert [e.where[-1] for e in read(path, path, max_samples=6)[0]] == ["1", "2", "3", "4", "5", "1"]
    assert read(path, domains=[])[0] == []
    assert read(path, max_samples=0)[0] == []


def test_keys_that_are_not_read_are_noted_once_per_file(write: Write, read: Read) -> None:
    path = write([{**ROW, "id": 1}, {**ROW, "id": 2, "tag": "x"}])
    _, problems, notes = read(path)
    assert problems == []
    assert [(n.line, n.field) for n in notes] == [(1, "id"), (2, "tag")]


def test_unknown_sample_names_those_that_are_there(read: Read) -> None:
    with pytest.raises(DataError, match=r"packaged are: .*customer_service\.jsonl"):
        read("samples:nothing.jsonl")
    with pytest.raises(DataError, match="no such sample"):
        read("samples:../settings.py")
