"""A bill taken apart adds up to the bill, whatever it is taken apart by."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.cli.main import invoke
from pingjia.cost import CostSettings, bill, breakdown
from pingjia.cost.parts import By, to_csv
from pingjia.ledger import Fact, Ledger

PRICES = CostSettings(price_per_hour=3.6, currency="CNY")
FACTS = [
    Fact("train", run="a", at="2026-01-02T00:00:00", seconds=1000, trained_tokens=50),
    Fact("train", run="b", at="2026-02-02T00:00:00", seconds=3000, trained_tokens=70),
    Fact("serve", run="s", at="2026-02-03T00:00:00", seconds=600),
    Fact("serve.request", at="2026-02-03T00:00:01", seconds=2, completion_tokens=10, who="ann", note={"id": "r1"}),
    Fact("serve.request", at="2026-02-03T00:00:02", seconds=4, completion_tokens=20, who="bob", note={"id": "r2"}),
    Fact("serve.request", at="2026-02-03T00:00:03", seconds=4, completion_tokens=20, who="bob", note={"cache": "hit"}),
]

facts = st.lists(
    st.builds(
        Fact,
        kind=st.sampled_from(["train", "serve", "serve.request", "eval.before"]),
        run=st.sampled_from(["", "a", "b"]),
        at=st.sampled_from(["", "2026-01-02T00:00:00", "2026-02-02T00:00:00"]),
        seconds=st.floats(0, 1e5),
        completion_tokens=st.integers(0, 100),
        who=st.sampled_from(["", "ann", "bob"]),
        note=st.sampled_from([{}, {"cache": "hit"}, {"id": "x"}]),
    ),
    max_size=12,
)


@given(facts, st.sampled_from(get_args(By)))
def test_the_parts_add_up(found: list[Fact], by: By) -> None:
    parts = breakdown(found, PRICES, by)
    billed = bill(found, PRICES)
    # A span of serving all of whose requests were cached has nobody to bill: it is in the total alone.
    missing = billed.total - sum(part.cost for part in parts)
    assert missing >= 0
    if not any(fact.note for fact in found):
        assert missing == 0


def test_by_run_key_month_and_request() -> None:
    assert [(p.name, float(p.cost)) for p in breakdown(FACTS, PRICES, "month")] == [("2026-02", 3.6), ("2026-01", 1.0)]
    runs = {p.name: float(p.cost) for p in breakdown(FACTS, PRICES, "run")}
    assert runs == {"b": 3.0, "a": 1.0, "(unnamed)": 0.6}
    keys = {p.name: p for p in breakdown(FACTS, PRICES, "who")}
    assert {name: float(p.cost) for name, p in keys.items()} == {"(no request)": 4.0, "bob": 0.4, "ann": 0.2}
    assert (keys["bob"].num_requests, keys["bob"].num_cache_hits, keys["bob"].completion_tokens) == (2, 1, 40)
    requests = breakdown(FACTS, PRICES, "request")
    assert [p.name.split()[-1] for p in requests] == ["1", "2", "r1", "r2", "5"]
    assert [float(p.cost) for p in requests] == [1.0, 3.0, 0.2, 0.4, 0.0]


def test_csv_and_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(breakdown(FACTS, PRICES, "run"), "CNY"))))
    assert rows[0]["name"] == "b"
    assert float(rows[0]["cost"]) == 3.0
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for fact in FACTS:
        ledger.append(fact)
    line = ["cost", "report", str(tmp_path), "price_per_hour=3.6", "--by"]
    picture = tmp_path / "cost.png"
    assert invoke([*line, "who", "--chart", str(picture)]) == 0
    assert "ann" in capfd.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert invoke([*line, "run", "--json"]) == 0
    assert {p["name"] for p in json.loads(capfd.readouterr().out)["parts"]} == {"a", "b", "(unnamed)"}
    assert invoke([*line, "colour"]) == 2
