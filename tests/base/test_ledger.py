"""The ledger: nothing that was appended whole is ever lost, whoever else writes or dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.ledger import Fact, Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "deep" / "ledger.jsonl")


def test_what_is_written_is_read(ledger: Ledger) -> None:
    facts = [
        ledger.append(Fact(kind="train", run="a", seconds=1.5, trained_tokens=7, note={"输出": "x\ny"})),
        ledger.append(Fact(kind="serve.request", who="键", prompt_tokens=3)),
    ]
    assert list(ledger.read()) == facts
    assert all(abs((datetime.now(UTC) - datetime.fromisoformat(f.at)).total_seconds()) < 60 for f in facts)


def test_a_line_has_no_empty_fields(ledger: Ledger) -> None:
    ledger.append(Fact(kind="serve.request", at="2026-01-01T00:00:00.000+00:00", prompt_tokens=3))
    row = json.loads(ledger.path.read_text(encoding="utf-8"))
    assert row == {"v": 1, "at": "2026-01-01T00:00:00.000+00:00", "kind": "serve.request", "prompt_tokens": 3}


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list(Ledger(tmp_path / "none").read()) == []
    assert not (tmp_path / "none").exists()


def test_kinds_and_runs(ledger: Ledger) -> None:
    for kind in ("serve", "serve.request", "server", "train", "eval.before"):
        ledger.append(Fact(kind=kind, run="a" if kind == "train" else "b"))
    assert [f.kind for f in ledger.read(kind="serve")] == ["serve", "serve.request"]
    assert [f.kind for f in ledger.read(kind="eval")] == ["eval.before"]
    assert [f.kind for f in ledger.read(kind="eval.before")] == ["eval.before"]
    assert [f.kind for f in ledger.read(run="a")] == ["train"]
    assert list(ledger.read(kind="serve", run="a")) == []


@pytest.mark.parametrize("damage", [b'{"v":1,"kind":"tr', b"\xff\xfe\x00", b"[1]", b"3", b"null", b"{}", b'"x"', b""])
def test_a_damaged_line_costs_only_itself(ledger: Ledger, damage: bytes) -> None:
    ledger.append(Fact(kind="a"))
    with open(ledger.path, "ab") as file:
        file.write(damage + b"\n")
    ledger.append(Fact(kind="b"))
    assert [f.kind for f in ledger.read()] == ["a", "b"]


def test_a_torn_end_does_not_swallow_the_next_fact(ledger: Ledger) -> None:
    """A crash in mid-write leaves a line without its end; the next fact must not be glued to it."""
    ledger.append(Fact(kind="a"))
    with open(ledger.path, "ab") as file:
        file.write(b'{"v":1,"at":"2026')
    ledger.append(Fact(kind="b"))
    ledger.append(Fact(kind="c"))
    assert [f.kind for f in ledger.read()] == ["a", "b", "c"]


def test_fields_of_a_later_version_are_passed_over(ledger: Ledger) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_text('{"v": 2, "kind": "train", "seconds": 2, "colour": "red"}\n', encoding="utf-8")
    assert [(f.kind, f.seconds) for f in ledger.read()] == [("train", 2)]


def test_processes_do_not_mix_their_lines(ledger: Ledger) -> None:
    code = (
        "import sys; from pingjia.ledger import Fact, Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(300):\n"
        "    note = {'x': '长' * (i * 7 % 3000)}\n"
        "    ledger.append(Fact(kind='k' + sys.argv[2], prompt_tokens=i + 1, note=note))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(ledger.path), str(n)]) for n in range(4)]
    assert [w.wait(timeout=60) for w in writers] == [0] * 4
    facts = list(ledger.read())
    assert len(facts) == 1200
    for n in range(4):
        assert [f.prompt_tokens for f in facts if f.kind == f"k{n}"] == list(range(1, 301))


def test_a_killed_writer_loses_at_most_its_last_line(ledger: Ledger) -> None:
    code = (
        "import sys; from pingjia.ledger import Fact, Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(10**6): ledger.append(Fact(kind='k', prompt_tokens=i + 1))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(ledger.path)])
    while not ledger.path.exists():
        time.sleep(0.005)
    time.sleep(0.05)
    writer.kill()
    writer.wait()
    counts = [f.prompt_tokens for f in ledger.read()]
    assert counts == list(range(1, len(counts) + 1))
    assert counts


def test_a_fact_that_fits_only_in_part_is_told(ledger: Ledger) -> None:
    """In a process that may not write files beyond 300 bytes; afterwards there is room again."""
    code = (
        "import resource, sys; from pingjia.ledger import Fact, Ledger\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(5): ledger.append(Fact(kind='first', note={'x': 'y' * 60}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ledger.path)], capture_output=True, text=True, check=False)
    assert "OSError" in done.stderr
    whole = [f.kind for f in ledger.read()]
    assert len(whole) == 2
    ledger.append(Fact(kind="later"))
    assert [f.kind for f in ledger.read()] == [*whole, "later"]


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        Ledger(tmp_path).append(Fact(kind="a"))


texts = st.text(max_size=20)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.builds(
        Fact,
        kind=st.sampled_from(["train", "serve.request"]),
        run=texts,
        seconds=st.floats(0, 1e9),
        prompt_tokens=st.integers(0, 2**60),
        who=texts,
        note=st.dictionaries(texts, st.integers() | texts | st.booleans() | st.none(), max_size=3),
    )
)
def test_any_fact_comes_back(tmp_path_factory: pytest.TempPathFactory, fact: Fact) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("any") / "l.jsonl")
    written = ledger.append(fact)
    assert list(ledger.read()) == [written]
