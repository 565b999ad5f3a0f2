"""The labelled fixture: every planted fault is found at its line, and nothing is said of a sound one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data import Job, Problem, prepare, read_examples
from pingjia.data.duplicates import Signatures, find_exact, find_near, signature
from pingjia.data.encode import encode_example
from pingjia.data.leaks import NEARLY, SAME_QUESTION, SAME_ROW, find_leaks
from pingjia.data.personal import find_personal, mask_example
from pingjia.data.rules import RULES, check_rules
from pingjia.data.settings import DataSettings, DuplicateSettings, PrepareSettings
from pingjia.language import identify
from pingjia.types import Example

FOLDER = Path(__file__).parent / "fixtures"
OF_FORM = ("json", "encoding", "row")


@pytest.fixture(scope="module")
def labels() -> dict[int, dict[str, Any]]:
    entries = json.loads((FOLDER / "faults.labels.json").read_text(encoding="utf-8"))
    return {entry["line"]: entry for entry in entries}


@pytest.fixture(scope="module")
def read() -> tuple[dict[int, Example], list[Problem]]:
    """Every sound row by its line, and the problems of the others."""
    problems: list[Problem] = []
    examples = {_line(e.where): e for e in read_examples([FOLDER / "faults.jsonl"], on_problem=problems.append)}
    return examples, problems


@pytest.fixture(scope="module")
def examples(read: tuple[dict[int, Example], list[Problem]]) -> dict[int, Example]:
    return read[0]


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])


def _with(labels: dict[int, dict[str, Any]], *rules: str) -> dict[int, dict[str, Any]]:
    return {line: entry for line, entry in labels.items() if set(rules) & set(entry["rules"])}


def test_the_fixture_is_what_it_claims(labels: dict[int, dict[str, Any]]) -> None:
    lines = (FOLDER / "faults.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(lines) == len(labels) >= 500
    num_sound = sum(not entry["rules"] for entry in labels.values())
    assert num_sound >= 0.6 * len(labels)
    counts = Counter(rule for entry in labels.values() for rule in entry["rules"])
    expected = {*RULES, "json", "encoding", "row", "duplicate", "near_duplicate", "leak", "length", "personal"}
    assert expected <= counts.keys()
    assert min(counts[rule] for rule in expected) >= 5


def test_the_script_makes_the_same_files(tmp_path: Path) -> None:
    script = _load(FOLDER / "make_faults.py")
    names = ("faults.jsonl", "faults.heldout.jsonl", "faults.labels.json")
    assert dict(zip(names, script.make(), strict=True)) == {name: (FOLDER / name).read_bytes() for name in names}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_faults_of_form(labels: dict[int, dict[str, Any]], read: tuple[dict[int, Example], list[Problem]]) -> None:
    found: dict[int, list[str]] = defaultdict(list)
    for problem in read[1]:
        found[problem.line].append(problem.field)
    planted = _with(labels, *OF_FORM)
    assert found.keys() == planted.keys()
    assert {line: entry["field"] for line, entry in planted.items() if entry["field"] not in found[line]} == {}
    assert read[0].keys() == labels.keys() - planted.keys()


def test_cheap_rules(labels: dict[int, dict[str, Any]], examples: dict[int, Example]) -> None:
    """Every rule at its lines, and no other at any line."""
    found = {line: [f.rule for f in check_rules(example)] for line, example in examples.items()}
    planted = {line: [rule for rule in labels[line]["rules"] if rule in RULES] for line in examples}
    assert {line: rules for line, rules in found.items() if rules != planted[line]} == {}


def test_personal_data(labels: dict[int, dict[str, Any]], examples: dict[int, Example]) -> None:
    found = {line: dict(mask_example(example)[1]) for line, example in examples.items()}
    planted = {line: labels[line].get("personal", {}) for line in examples}
    assert {line: kinds for line, kinds in found.items() if kinds != planted[line]} == {}


def test_nothing_personal_is_left_in_masked_rows(examples: dict[int, Example]) -> None:
    for example in examples.values():
        masked, _ = mask_example(example)
        assert not any(find_personal(message.content) for message in masked.messages)
        assert check_rules(masked) == check_rules(example)


def test_languages(labels: dict[int, dict[str, Any]], examples: dict[int, Example]) -> None:
    """At least 98 of 100 questions and answers, most of them short, and of Chinese, English and both each."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for line, example in examples.items():
        for name, text in (("question", example.messages[-2].content), ("answer", example.response)):
            if (lang := labels[line][name]) is not None and example.messages[-2].role == "user":
                total[lang] += 1
                right[lang] += identify(text).lang == lang
    assert total.total() > 1000
    assert right.total() >= 0.98 * total.total()
    for lang in ("zh", "en", "mixed", "und"):
        assert right[lang] >= 0.98 * total[lang], lang


def test_duplicates(labels: dict[int, dict[str, Any]], examples: dict[int, Example]) -> None:
    lines = [*examples]
    signatures = Signatures.of([signature(example) for example in examples.values()])
    exact = find_exact(signatures)
    near = find_near(signatures, DuplicateSettings().near or 0, exact < 0)
    assert _found(lines, exact) == {line: e["repeats"] for line, e in _with(labels, "duplicate").items()}
    assert _found(lines, near) == {line: e["repeats"] for line, e in _with(labels, "near_duplicate").items()}


def _found(lines: list[int], others: np.ndarray) -> dict[int, int]:
    return {lines[i]: lines[other] for i, other in enumerate(others) if other >= 0}


def test_leaks(labels: dict[int, dict[str, Any]], examples: dict[int, Example]) -> None:
    held_out = read_examples([FOLDER / "faults.heldout.jsonl"], on_problem=lambda p: pytest.fail(str(p)))
    theirs = Signatures.of([signature(example) for example in held_out])
    mine = Signatures.of([signature(example) for example in examples.values()])
    where, how = find_leaks(mine, theirs, DuplicateSettings().near)
    assert {line for line, at in zip(examples, where, strict=True) if at >= 0} == _with(labels, "leak").keys()
    assert Counter(how[how > 0].tolist()) == {SAME_ROW: 4, SAME_QUESTION: 2, NEARLY: 3}


def test_lengths(labels: dict[int, dict[str, Any]], examples: dict[int, Example], smollm2: Tokenizer) -> None:
    encoded = {line: encode_example(example, smollm2, 1024) for line, example in examples.items()}
    too_long = {line for line, result in encoded.items() if isinstance(result, Problem)}
    assert too_long == _with(labels, "length").keys()


def test_the_whole_preparation(labels: dict[int, dict[str, Any]], tmp_path: Path, smollm2: Tokenizer) -> None:
    """Exactly the faulty lines are rejected; what is personal is masked in the rows that stay."""
    files = DataSettings(
        dataset=[str(FOLDER / "faults.jsonl")], eval_dataset=[str(FOLDER / "faults.heldout.jsonl")], cutoff_len=1024
    )
    prepare(Job(files, PrepareSettings.model_validate({"personal": {"action": "mask"}}), "smollm2", tmp_path / "out"))
    rejected = {
        _line(row["where"]): [*dict.fromkeys(row["rules"])] for row in _rows(tmp_path / "out" / "rejected.jsonl")
    }
    assert rejected == {line: e["rules"] for line, e in labels.items() if set(e["rules"]) - {"personal"}}
    changed = {_line(row["where"]) for row in _rows(tmp_path / "out" / "changed.jsonl")}
    assert changed == _with(labels, "personal").keys()
    kept = [*read_examples([tmp_path / "out" / "train.jsonl"], on_problem=lambda p: pytest.fail(str(p)))]
    assert len(kept) == len(labels) - len(rejected)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]  # U+0085 in a text ends no line
