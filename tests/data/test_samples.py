"""The packaged sample data keeps what the demo and the evaluation promise of it."""

import re
import unicodedata
from pathlib import Path

import pytest

from pingjia.data import check_files, read_examples
from pingjia.data.files import SAMPLES
from pingjia.script import zh_share
from pingjia.types import Example

DOMAINS = ("customer_service", "tutoring", "writing")


def _read(name: str) -> list[Example]:
    problems: list[object] = []
    examples = list(read_examples([f"samples:{name}"], on_problem=problems.append))
    assert problems == []
    return examples


@pytest.fixture(scope="module")
def training() -> list[Example]:
    return [e for domain in DOMAINS for e in _read(f"{domain}.jsonl")]


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return [e for domain in DOMAINS for e in _read(f"{domain}.heldout.jsonl")]


def _normal(text: str) -> str:
    """A question without what does not change it: width, case, spaces, punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).lower())


def test_every_file_is_one_of_ours() -> None:
    expected = {f"{d}.jsonl" for d in DOMAINS} | {f"{d}.heldout.jsonl" for d in DOMAINS}
    assert {p.name for p in SAMPLES.glob("*.jsonl")} == expected


def test_there_are_enough(training: list[Example], held_out: list[Example]) -> None:
    assert len(training) >= 450
    assert len(held_out) >= 60


def test_most_of_it_is_chinese(training: list[Example], held_out: list[Example]) -> None:
    share = zh_share(m.content for e in [*training, *held_out] for m in e.messages)
    assert share is not None
    assert share >= 0.70


def test_each_row_names_its_domain(training: list[Example], held_out: list[Example]) -> None:
    for example in [*training, *held_out]:
        assert example.domain == Path(example.where.removeprefix("samples:")).name.split(".")[0], example.where


def test_no_held_out_question_is_trained(training: list[Example], held_out: list[Example]) -> None:
    trained = {_normal(e.prompt[-1].content): e.where for e in training}
    assert [(e.where, trained[q]) for e in held_out if (q := _normal(e.prompt[-1].content)) in trained] == []


def test_every_held_out_topic_is_trained(training: list[Example], held_out: list[Example]) -> None:
    topics = {(e.domain, e.topic) for e in training if e.topic}
    assert [e.where for e in held_out if (e.domain, e.topic) not in topics] == []


def test_facts_stand_in_the_answers(training: list[Example], held_out: list[Example]) -> None:
    assert [e.where for e in [*training, *held_out] if not all(f in e.response for f in e.facts)] == []
    assert [e.where for e in held_out if not e.facts] == []


def test_the_check_finds_nothing() -> None:
    report = check_files([f"samples:{p.name}" for p in sorted(SAMPLES.glob("*.jsonl"))])
    assert [str(p) for p in report.problems] == []
    assert [str(n) for n in report.notes] == []
