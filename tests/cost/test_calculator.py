"""A year by assumption: the arithmetic by hand, where each figure comes from, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pingjia.cli.main import invoke
from pingjia.cost import Assumptions, CostSettings, Estimate, estimate, resolve
from pingjia.ledger import Fact, Ledger

PRICES = resolve(CostSettings(price_per_hour=2, electricity_price_per_kwh=1, power_w=500))


def origins(found: Estimate) -> dict[str, str]:
    return {a.name: a.origin for a in found.assumptions}


def test_by_hand() -> None:
    given = Assumptions(
        training_hours=100, runs_per_year=4, users=1000, requests_per_user_per_day=10, answer_seconds=3.6,
        cached_share=0.5, busy_share=0.5, stored_gb=10, storage_price_per_gb_month=0.1,
    )  # fmt: skip
    found = estimate(given, PRICES)
    assert found.per_run == pytest.approx(250)  # 100 h at 2 + 0.5 of electricity
    assert found.tuning_per_year == pytest.approx(1000)
    assert found.storage_per_year == pytest.approx(12)
    # 3,650,000 requests, half computed, 3.6 s each: 1,825 hours
    assert found.serving_hours_per_year == pytest.approx(1825)
    assert found.per_request == pytest.approx(1825 * 2.5 / 3_650_000)
    assert found.per_user_year_by_use == pytest.approx((1012 + 1825 * 2.5) / 1000)
    assert found.num_machines == 1
    assert found.per_user_year_always_on == pytest.approx((1012 + 8760 * 2 + 1825 * 0.5) / 1000)
    assert found.hours_within_budget == pytest.approx(400)
    assert "1000 CNY buy 400.0 hours; a run of 100 hours fits in that" in found.lines()[-1]
    assert set(origins(found).values()) == {"given"}


def test_more_machines_where_one_is_too_busy() -> None:
    asked = {"users": 10_000, "requests_per_user_per_day": 100, "answer_seconds": 1, "cached_share": 0}
    found = estimate(Assumptions(**asked, busy_share=0.5), PRICES)
    assert found.serving_hours_per_year == pytest.approx(365e6 / 3600)
    assert found.num_machines == 24  # 101,389 hours, 4,380 of each machine


def test_the_ledger_is_believed_unless_the_user_says_otherwise() -> None:
    facts = [
        Fact("train", run="a", seconds=1800, stored_bytes=2_000_000_000),
        Fact("train", run="a", seconds=1800, stored_bytes=2_000_000_000),
        Fact("train", run="b", seconds=7200),
        Fact("serve.request", seconds=8, note={"share_s": 2}),
        Fact("serve.request", seconds=4),
        Fact("serve.request", seconds=1, note={"cache": "hit"}),
    ]
    found = estimate(Assumptions(answer_seconds=5), PRICES, facts)
    values = {a.name: a.value for a in found.assumptions}
    assert values["training_hours"] == 1.5
    assert values["stored_gb"] == 2
    assert values["cached_share"] == pytest.approx(1 / 3)
    assert values["answer_seconds"] == 5
    assert origins(found) | {"training_hours": "measured", "answer_seconds": "given", "users": "assumed"} == origins(
        found
    )
    free = estimate(Assumptions(), PRICES, facts)
    assert {a.name: a.value for a in free.assumptions}["answer_seconds"] == 3  # 2 s of the machine, and 4


def test_nobody_asks_and_nothing_costs() -> None:
    found = estimate(Assumptions(requests_per_user_per_day=0), resolve(CostSettings(price_per_hour=0)))
    assert (found.per_request, found.per_run, found.hours_within_budget) == (0, 0, None)
    assert "costs nothing" in found.lines()[-1]


def test_the_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Ledger(tmp_path / "ledger.jsonl").append(Fact("train", run="a", seconds=3600))
    assert invoke(["cost", "estimate", str(tmp_path), "price_per_hour=2.5", "users=7", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["assumptions"]["training_hours"] == {"value": 1.0, "origin": "measured"}
    assert found["assumptions"]["users"] == {"value": 7, "origin": "given"}
    assert found["per_run"] == 2.5
    assert invoke(["cost", "estimate"]) == 0
    assert "(assumed)" in capfd.readouterr().out
    for line, words in (
        (["usrs=7"], "usrs: unknown key; did you mean users?"),
        (["cached_share=2"], "cached_share"),
        (["busy_share=0"], "busy_share"),
        (["a", "b"], "2 ledgers named"),
        (["nowhere"], "no ledger here"),
        (["training_hours=1e308", "price_per_hour=1e308"], "more money than a number can hold"),
    ):
        assert invoke(["cost", "estimate", *line]) == 2
        assert words in capfd.readouterr().err
