"""Public data files of other tools: read whole, or each row named."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pingjia.chat import load_tokenizer
from pingjia.chat.tokenizer import Tokenizer
from pingjia.chat.tools import parse_tool_calls
from pingjia.data import Problem, check_files, encode_examples, read_examples


@pytest.mark.parametrize(("name", "num"), [("alpaca_zh_demo.json", 1000), ("alpaca_en_demo.json", 999)])
def test_alpaca(shared: Path, smollm2: Tokenizer, name: str, num: int) -> None:
    report = check_files([shared / name], smollm2, 2048)
    assert report.ok
    assert report.num_examples == report.num_rows == num
    assert report.layouts == {"alpaca": num}
    assert report.zh_share is not None
    assert (report.zh_share > 0.8) == ("zh" in name)


def test_alpaca_line_numbers_point_at_the_row(shared: Path) -> None:
    path = shared / "alpaca_zh_demo.json"
    lines = path.read_text(encoding="utf-8").split("\n")
    for example in read_examples([path], on_problem=print):
        number = int(example.where.rpartition(":")[2])
        assert lines[number - 1].strip() == "{"
        assert json.dumps(example.prompt[-1].content[:5], ensure_ascii=False)[1:-1].split("\\n")[0] in lines[number]


def test_glaive_conversations_with_tools(shared: Path, smollm2: Tokenizer) -> None:
    problems: list[Problem] = []
    examples = list(read_examples([shared / "glaive_toolcall_zh_demo.json"], on_problem=problems.append))
    assert problems == []
    assert len(examples) == 300
    roles = Counter(m.role for e in examples for m in e.messages)
    assert set(roles) == {"user", "assistant", "tool"}
    encoded, left_out = encode_examples(examples, smollm2, 1024)
    assert len(encoded) + len(left_out) == 300
    assert {p.field for p in left_out} == {"length"}
    num_answers = {e.where: sum(m.role == "assistant" for m in e.messages) for e in examples}
    for row in encoded:
        ends = sum(learn and i in smollm2.stop_ids for i, learn in zip(row.ids, row.learn, strict=True))
        assert ends == num_answers[row.where]


def test_glaive_tools_and_calls_are_read(shared: Path) -> None:
    examples = list(read_examples([shared / "glaive_toolcall_zh_demo.json"], on_problem=print))
    calls = [call for e in examples for m in e.messages for call in m.tool_calls]
    assert len(calls) == 216
    assert sum(bool(e.tools) for e in examples) == 200
    assert sum(len(e.tools) for e in examples) == 239
    assert sum(m.role == "tool" for e in examples for m in e.messages) == 218  # two answer what is no call
    report = check_files([shared / "glaive_toolcall_zh_demo.json"])
    assert [n.field for n in report.notes if n.field == "tools"] == []


def test_glaive_calls_are_found_in_what_is_learnt(shared: Path, smollm2: Tokenizer) -> None:
    for example in read_examples([shared / "glaive_toolcall_zh_demo.json"], on_problem=print):
        encoded = smollm2.encode_example(example)
        prompt = smollm2.render(example.prompt, tools=example.tools)
        assert list(encoded.ids[: len(prompt)]) == prompt
        last = example.messages[-1]
        assert parse_tool_calls(smollm2.decode(encoded.ids[len(prompt) :])) == (last.content, last.tool_calls)


@pytest.mark.parametrize("name", ["tokenizer", "tiny_v1_chat", "tiny_v2"])
def test_glaive_with_chatglm(shared: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared.parent / "fixtures" / "chatglm" / name)
    for example in read_examples([shared / "glaive_toolcall_zh_demo.json"], on_problem=print):
        encoded = tokenizer.encode_example(example)
        prompt = tokenizer.render(example.prompt, tools=example.tools)
        assert list(encoded.ids[: len(prompt)]) == prompt
        assert all(encoded.learn[len(prompt) :])


def test_information_extraction_lines(shared: Path, smollm2: Tokenizer) -> None:
    report = check_files([shared / "spo_1.jsonl"], smollm2, 1024)
    assert report.num_rows == 50
    assert report.num_examples == 44
    assert {p.field for p in report.problems} == {"length"}


def test_answers_that_are_lists_are_named_row_by_row(shared: Path) -> None:
    report = check_files([shared / "d2q_1.jsonl"])
    assert [p.line for p in report.problems] == list(range(1, 21))
    assert {p.reason for p in report.problems} == {"must be a string, not a list"}
