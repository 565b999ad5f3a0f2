"""What a check reports: problems, notes, counts, lengths, share of Chinese; and encoding that never cuts."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data import Problem, check_files, encode_examples, fingerprint, read_examples, resolve
from pingjia.data.check import MAX_KEPT, _lengths
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError, ModelError
from pingjia.script import count_han, count_letters, zh_share
from pingjia.types import Encoded, Example, Message

Write = Callable[..., Path]

ZH = {"prompt": "你好吗", "response": "很好", "domain": "chat", "lang": "zh"}
EN = {"prompt": "how are you", "response": "fine", "domain": "chat", "lang": "en"}


# ---- check_files


def test_a_clean_file(write: Write, smollm2: Tokenizer) -> None:
    path = write([ZH, EN, {"instruction": "写一首诗", "output": "春眠不觉晓"}])
    report = check_files([path], smollm2, cutoff_len=100)
    assert report.ok
    assert report.problems == report.notes == []
    assert (report.num_rows, report.num_examples) == (3, 3)
    assert report.domains == {"chat": 2, "-": 1}
    assert report.langs == {"zh": 1, "en": 1, "-": 1}
    assert report.layouts == {"prompt": 2, "alpaca": 1}
    assert report.num_chars == 5 + 15 + 9
    assert report.zh_share == pytest.approx(14 / (14 + 13))
    sizes = {e.where: len(smollm2.encode_example(e).ids) for e in read_examples([path], on_problem=print)}
    assert dict(report.longest) == sizes
    assert report.lengths is not None
    assert (report.lengths.unit, report.lengths.longest, report.lengths.total) == (
        "tokens",
        max(sizes.values()),
        sum(sizes.values()),
    )


def test_lengths_without_a_tokenizer_are_characters(write: Write) -> None:
    rows = [{"prompt": "q", "response": "x" * n} for n in range(1, 101)]
    report = check_files([write(rows)])
    assert report.lengths is not None
    assert report.lengths.unit == "characters"
    assert (report.lengths.p50, report.lengths.p90, report.lengths.p99, report.lengths.longest) == (52, 92, 101, 101)
    assert [size for _, size in report.longest] == [101, 100, 99, 98, 97]


def test_every_kind_of_problem_has_its_line(write: Write, smollm2: Tokenizer, tmp_path: Path) -> None:
    path = write([ZH, {"prompt": "x" * 2000, "response": "y"}, {"prompt": "", "response": "y"}, ZH, {"promt": 1}])
    missing = tmp_path / "no.jsonl"
    report = check_files([path, missing], smollm2, cutoff_len=50)
    assert not report.ok
    assert [str(p).split(": ")[0].removeprefix(str(tmp_path)) for p in report.problems] == [
        "/data.jsonl:2",
        "/data.jsonl:3",
        "/data.jsonl:5",
        "/no.jsonl:0",
    ]
    assert [p.field for p in report.problems] == ["length", "prompt", "layout", "file"]
    assert "over cutoff_len 50" in report.problems[0].reason
    assert (report.num_rows, report.num_examples) == (5, 2)


def test_duplicates_are_notes(write: Write) -> None:
    other = {**ZH, "response": "不好"}
    path = write([ZH, EN, other, {**ZH, "domain": "else"}, ZH])
    report = check_files([path])
    assert report.ok
    assert [(n.line, n.field) for n in report.notes] == [(4, "row"), (5, "row")]
    assert f"{path}:1" in report.notes[0].reason
    assert report.num_examples == 5


def test_rules_are_counted_with_samples(write: Write) -> None:
    report = check_files([write([ZH] * 9 + [{"prompt": 1}, 5])])
    assert report.rules == {"row": 2, "json": 1, "duplicate": 8}
    assert report.samples["duplicate"] == report.notes[:5]
    assert json.loads(json.dumps(report.to_dict()))["samples"]["duplicate"][0]["line"] == 2


def test_notes_come_in_the_order_of_the_rows(write: Write) -> None:
    a = write([ZH, ZH, {**EN, "id": 1}], "b.jsonl")
    b = write([{**ZH, "id": 1}, EN], "a.jsonl")
    notes = check_files([a, b]).notes
    assert [(Path(n.file).name, n.line, n.field) for n in notes] == [
        ("b.jsonl", 2, "row"),
        ("b.jsonl", 3, "id"),
        ("a.jsonl", 1, "id"),
        ("a.jsonl", 1, "row"),
        ("a.jsonl", 2, "row"),
    ]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_quantiles_are_those_of_the_sorted_lengths(sizes: list[int]) -> None:
    found, ordered = _lengths(Counter(sizes), "x"), sorted(sizes)
    expected = [ordered[min(len(sizes) - 1, int(share * len(sizes)))] for share in (0.5, 0.9, 0.99)]
    assert [found.p50, found.p90, found.p99, found.longest, found.total] == [*expected, ordered[-1], sum(sizes)]


def test_the_same_file_twice_is_all_duplicates(write: Write) -> None:
    path = write([ZH, EN])
    report = check_files([path, path])
    assert report.num_examples == 4
    assert report.num_notes == 2


def test_history_makes_a_difference_between_rows(write: Write) -> None:
    path = write([ZH, {**ZH, "history": [["a", "b"]]}])
    assert check_files([path]).notes == []


def test_only_some_domains_are_counted_but_all_rows_are_checked(write: Write) -> None:
    path = write([ZH, {**EN, "domain": "other"}, {"prompt": "", "response": "x", "domain": "other"}])
    report = check_files([path], domains=["chat"])
    assert report.num_examples == 1
    assert report.num_problems == 1


def test_no_files_and_no_rows(write: Write) -> None:
    assert not check_files([]).ok
    report = check_files([write("")])
    assert [p.field for p in report.problems] == ["file"]


def test_report_is_json(write: Write, smollm2: Tokenizer) -> None:
    report = check_files([write([ZH, {"prompt": 1}])], smollm2, 100)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["ok"] is False
    assert value["problems"][0]["line"] == 2
    assert value["lengths"]["unit"] == "tokens"


def test_a_file_of_garbage_does_not_fill_memory(write: Write) -> None:
    report = check_files([write("x\n" * (MAX_KEPT + 50))])
    assert report.num_problems == MAX_KEPT + 50
    assert len(report.problems) == MAX_KEPT
    assert report.num_rows == MAX_KEPT + 50


ROWS = st.sampled_from(
    [ZH, EN, {"prompt": "q"}, {"prompt": "", "response": ""}, {"messages": []}, [], 5, "broken", {"x": 1}]
)


@given(st.lists(ROWS, min_size=1))
def test_no_row_is_lost_without_a_word(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    rows = [ZH, *rows]  # the first line tells whether a file is one array
    path.write_text("\n".join("{" if row == "broken" else json.dumps(row) for row in rows) + "\n")
    report = check_files([path])
    assert report.num_rows == len(rows)
    assert report.num_examples == sum(row in (ZH, EN) for row in rows)
    assert {p.line for p in report.problems} == {i for i, row in enumerate(rows, 1) if row not in (ZH, EN)}


# ---- encode_examples


def _example(question: str, answer: str = "答", where: str = "f.jsonl:1") -> Example:
    return Example((Message("user", question), Message("assistant", answer)), where=where)


def test_rows_that_do_not_fit_are_left_out_whole(smollm2: Tokenizer) -> None:
    short, long = _example("短", where="f.jsonl:1"), _example("长" * 500, where="f.jsonl:2")
    encoded, problems = encode_examples([short, long, short], smollm2, cutoff_len=60)
    assert encoded == [smollm2.encode_example(short)] * 2
    assert [(p.file, p.line, p.field) for p in problems] == [("f.jsonl", 2, "length")]
    assert all(e.ids[-1] in smollm2.stop_ids for e in encoded)


def test_cutoff_is_inclusive(smollm2: Tokenizer) -> None:
    example = _example("短")
    size = len(smollm2.encode_example(example).ids)
    assert encode_examples([example], smollm2, size)[1] == []
    with pytest.raises(DataError, match=rf"0 examples left.*{size} tokens, over cutoff_len {size - 1}"):
        encode_examples([example], smollm2, size - 1)


def test_nothing_left_is_an_error(smollm2: Tokenizer) -> None:
    with pytest.raises(DataError, match="0 examples left to train on; check dataset, domains and max_samples"):
        encode_examples([], smollm2, 100)


class _Unlearnt:
    """Stands for a tokenizer whose mask came out empty."""

    def encode_example(self, example: Example) -> Encoded:
        return Encoded((1, 2), (False, False), example.where)


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(DataError, match="1 examples hold 0 tokens to learn"):
        encode_examples([_example("q")], _Unlearnt(), 100)  # type: ignore[arg-type]


def test_what_the_template_refuses_is_a_problem_of_the_row(smollm2: Tokenizer) -> None:
    bad = Example((Message("user", "\ud800"), Message("assistant", "a")), where="f.jsonl:9")
    encoded, problems = encode_examples([_example("q"), bad], smollm2, 100)
    assert len(encoded) == 1
    assert [(p.line, p.field) for p in problems] == [(9, "messages")]


def test_examples_that_were_made_have_no_line(smollm2: Tokenizer) -> None:
    _, problems = encode_examples([_example("q"), _example("长" * 500, where="")], smollm2, 100)
    assert (problems[0].file, problems[0].line) == ("example", 0)


def test_a_template_unfit_for_training_is_a_model_error(write: Write) -> None:
    from pingjia.chat import load_tokenizer

    tokenizer = load_tokenizer("smollm2", template="{{ messages[-1].content }}")
    with pytest.raises(ModelError, match=r"data\.jsonl:1: the chat template"):
        check_files([write([ZH])], tokenizer)


# ---- files


def test_fingerprint_follows_contents_and_order(write: Write, tmp_path: Path) -> None:
    a, b = write([ZH], "a.jsonl"), write([EN], "b.jsonl")
    first = fingerprint([a, b])
    assert len(first) == 64
    assert fingerprint([a, b]) == first
    assert fingerprint([b, a]) != first
    assert fingerprint([a]) != fingerprint([a, a])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(a.read_bytes())
    assert fingerprint([copy, b]) == first
    copy.write_bytes(a.read_bytes() + b"\n")
    assert fingerprint([copy, b]) != first


def test_fingerprint_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        fingerprint([tmp_path / "no.jsonl"])


def test_names_of_samples() -> None:
    path = resolve("samples:customer_service.jsonl")
    assert path.is_file()
    assert resolve(str(path)) == path
    assert resolve("~/x.jsonl") == Path.home() / "x.jsonl"


# ---- settings


def test_settings() -> None:
    settings = DataSettings.model_validate({"dataset": "a.jsonl", "domains": "chat"})
    assert settings.dataset == ["a.jsonl"]
    assert settings.domains == ["chat"]
    assert (settings.eval_dataset, settings.cutoff_len, settings.max_samples) == ([], 1024, None)


@pytest.mark.parametrize(
    "bad", [{}, {"dataset": []}, {"dataset": "a", "cutoff_len": 0}, {"dataset": "a", "max_samples": 0}]
)
def test_settings_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        DataSettings.model_validate(bad)


# ---- how Chinese a text is


def test_share_of_chinese() -> None:
    assert zh_share(["你好 world 123，。😀"]) == pytest.approx(2 / 7)
    assert zh_share(["繁體々〇"]) == 1.0
    assert zh_share(["かな한글"]) == 0.0
    assert zh_share(["123，。"]) is None
    assert zh_share([]) is None


def test_han_is_the_unicode_script() -> None:
    for code in range(0x110000):
        char = chr(code)
        name = unicodedata.name(char, "")
        if name.startswith(("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")):
            assert count_han(char) == count_letters(char) == 1, name
        elif name and char not in "々〇":
            assert count_han(char) == 0, name


@given(st.text() | st.text(st.sampled_from("aZ1 〇々中é½²Ⅷ，_")))
def test_chinese_characters_are_letters(text: str) -> None:
    assert 0 <= count_han(text) <= count_letters(text) <= len(text)
    assert count_letters(text) == sum(c.isalpha() or count_han(c) for c in text)


def test_problem_as_text() -> None:
    assert str(Problem("f.jsonl", 3, "prompt", "is empty")) == "f.jsonl:3: prompt: is empty"
