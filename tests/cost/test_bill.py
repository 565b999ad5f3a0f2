"""Bills: exact, adding up to the last digit, and no second billed twice."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.cost import Bill, CostSettings, bill
from pingjia.cost.bill import apportion
from pingjia.errors import DataError
from pingjia.ledger import Fact, Ledger

KINDS = (
    "data.check",
    "train",
    "train.step",
    "eval.before",
    "eval.after",
    "serve",
    "serve.request",
    "serve.request.tool",
)
HIT = {"cache": "hit"}

counts = st.integers(0, 10**9)
facts_strategy = st.lists(
    st.builds(
        Fact,
        kind=st.sampled_from(KINDS),
        seconds=st.one_of(st.just(0.0), st.floats(0, 1e6), st.decimals(0, 10**5, places=3).map(float)),
        prompt_tokens=counts,
        completion_tokens=counts,
        trained_tokens=counts,
        learnt_tokens=counts,
        num_requests=st.integers(0, 5),
        peak_bytes=counts,
        stored_bytes=counts,
        energy_wh=st.one_of(st.just(0.0), st.floats(0, 1e4)),
        who=st.sampled_from(["", "a", "小王"]),
        note=st.sampled_from([{}, HIT, {"cache": "miss"}]),
    ),
    max_size=25,
)
settings_strategy = st.builds(
    CostSettings,
    price_per_hour=st.one_of(st.floats(0, 1000), st.sampled_from([0.0, 0.1, 1.0, 2.35])),
    electricity_price_per_kwh=st.sampled_from([0.0, 0.56]),
    power_w=st.sampled_from([None, 0.0, 450.0]),
)


def written(number: float) -> Fraction:
    return Fraction(repr(number))


def added(found: Bill) -> list:
    return [line for line in found.stages if line.included_in is None]


@given(facts_strategy, settings_strategy)
@settings(max_examples=200, deadline=None)
def test_parts_add_up_to_the_total_exactly(facts: list[Fact], prices: CostSettings) -> None:
    found = bill(facts, prices)
    assert sum((line.cost for line in added(found)), Decimal(0)) == found.total
    assert all(line.cost is None for line in found.stages if line.included_in is not None)
    assert {line.kind for line in found.stages} == {fact.kind for fact in facts}


@given(facts_strategy, st.sampled_from([0.0, 0.1, 1.0, 2.35, 19.99]))
@settings(max_examples=200, deadline=None)
def test_total_is_billed_seconds_times_price(facts: list[Fact], price: float) -> None:
    spans = {fact.kind for fact in facts if fact.seconds > 0 and fact.note != HIT}
    billed = [
        written(fact.seconds)
        for fact in facts
        if fact.note != HIT and not any(fact.kind.startswith(span + ".") for span in spans)
    ]
    expected = sum(billed, Fraction(0)) * written(price) / 3600
    found = bill(facts, CostSettings(price_per_hour=price))
    assert abs(Fraction(found.total) - expected) <= Fraction(1, 2_000_000)
    assert abs(Fraction(found.seconds) - sum(billed, Fraction(0))) <= Fraction(1, 10**12)


@given(facts_strategy, settings_strategy)
@settings(max_examples=150, deadline=None)
def test_every_part_is_its_own_share_to_a_millionth(facts: list[Fact], prices: CostSettings) -> None:
    for line in added(bill(facts, prices)):
        own = [fact for fact in facts if fact.kind == line.kind]
        time = sum((written(f.seconds) for f in own if f.note != HIT), Fraction(0))
        power = written(prices.power_w or 0.0)
        energy = sum(
            (
                written(f.energy_wh) or (Fraction(0) if f.note == HIT else written(f.seconds) * power / 3600)
                for f in own
            ),
            Fraction(0),
        )
        exact = time * written(prices.price_per_hour) / 3600 + energy * written(prices.electricity_price_per_kwh) / 1000
        assert abs(Fraction(line.cost) - exact) <= Fraction(2, 1_000_000)


@given(facts_strategy, settings_strategy)
@settings(max_examples=150, deadline=None)
def test_shares_never_exceed_what_serving_cost(facts: list[Fact], prices: CostSettings) -> None:
    found = bill(facts, prices)
    served = sum((line.cost for line in added(found) if line.kind.split(".")[0] == "serve"), Decimal(0))
    shared = sum((share.cost for share in found.shares), Decimal(0))
    assert shared <= served
    serving = {line.kind for line in added(found) if line.kind.split(".")[0] == "serve"}
    if len(serving) == 1 and any(f.kind == "serve.request" and f.note != HIT for f in facts):
        assert shared == served  # one stage, and somebody asked: all of it is theirs


@given(facts_strategy, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_facts_does_not_change_the_total(facts: list[Fact], random) -> None:
    shuffled = random.sample(facts, len(facts))
    assert bill(shuffled, CostSettings()).total == bill(facts, CostSettings()).total


@given(st.integers(0, 10**12), st.lists(st.fractions(0, 10**6), max_size=20))
def test_apportioned_parts_add_up_and_stay_next_to_their_share(total: int, weights: list[Fraction]) -> None:
    parts = apportion(total, weights)
    whole = sum(weights, Fraction(0))
    assert sum(parts) == (total if whole else 0)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - (total * weight / whole if whole else 0)) < 1
        assert part == 0 or weight > 0


def test_a_known_bill() -> None:
    facts = [
        Fact("data.check", seconds=0.9),
        Fact("train", seconds=3600.0, trained_tokens=50_000, learnt_tokens=10_000, peak_bytes=5, stored_bytes=7),
        Fact("eval.before", seconds=36.0, completion_tokens=200),
        Fact("eval.after", seconds=18.0, completion_tokens=100, peak_bytes=9, stored_bytes=1),
    ]
    found = bill(facts, CostSettings(price_per_hour=2.0))
    assert [(line.kind, str(line.cost)) for line in found.stages] == [
        ("data.check", "0.000500"),
        ("train", "2.000000"),
        ("eval.before", "0.020000"),
        ("eval.after", "0.010000"),
    ]
    assert str(found.total) == "2.030500"
    assert found.rates.per_1k_trained_tokens == Decimal("0.04")
    assert found.rates.per_1k_learnt_tokens == Decimal("0.2")
    assert found.rates.per_1k_answered_tokens is None  # evaluation answers are not served answers
    assert (found.peak_bytes, found.stored_bytes, found.seconds) == (9, 8, Decimal("3654.9"))


def test_requests_inside_a_serve_span_are_itemised_not_added() -> None:
    requests = [Fact("serve.request", seconds=50.0, completion_tokens=100, num_requests=1, who="a") for _ in range(4)]
    found = bill([Fact("serve", seconds=100.0), *requests], CostSettings(price_per_hour=36.0))
    assert found.total == Decimal(1)
    assert found.seconds == 100
    assert [(line.kind, line.included_in) for line in found.stages] == [("serve", None), ("serve.request", "serve")]
    assert found.stages[0].completion_tokens == found.stages[1].completion_tokens == 400
    assert found.stages[0].num_requests == 4
    assert found.rates.per_1k_answered_tokens == Decimal("2.5")
    assert found.rates.per_request == Decimal("0.25")


def test_requests_without_a_span_are_added() -> None:
    requests = [Fact("serve.request", seconds=50.0, num_requests=1) for _ in range(4)]
    assert bill(requests, CostSettings(price_per_hour=36.0)).total == Decimal(2)


def test_a_parent_without_seconds_is_no_span() -> None:
    facts = [Fact("serve", note={"event": "started"}), Fact("serve.request", seconds=100.0)]
    assert bill(facts, CostSettings(price_per_hour=36.0)).total == Decimal(1)


def test_a_name_that_only_begins_alike_is_no_child() -> None:
    facts = [Fact("serve", seconds=100.0), Fact("server.request", seconds=100.0)]
    assert bill(facts, CostSettings(price_per_hour=36.0)).total == Decimal(2)


def test_a_grandchild_is_itemised_under_the_nearest_span() -> None:
    facts = [Fact("a", seconds=1.0), Fact("a.b.c", seconds=1.0), Fact("a.b", seconds=1.0), Fact("a.x.y", seconds=1.0)]
    found = {line.kind: line.included_in for line in bill(facts, CostSettings()).stages}
    assert found == {"a": None, "a.b": "a", "a.b.c": "a.b", "a.x.y": "a"}


def test_tokens_that_the_span_reports_itself_are_not_counted_again() -> None:
    facts = [
        Fact("serve", seconds=9.0, completion_tokens=100),
        Fact("serve.request", seconds=1.0, completion_tokens=90),
    ]
    assert bill(facts, CostSettings()).stages[0].completion_tokens == 100


def test_cache_hits_cost_nothing() -> None:
    hit = Fact("serve.request", seconds=5.0, num_requests=1, who="a", note=HIT)
    miss = Fact("serve.request", seconds=10.0, num_requests=1, who="b")
    assert bill([hit], CostSettings(price_per_hour=3600.0)).total == 0
    alone = bill([hit, miss], CostSettings(price_per_hour=3600.0))
    assert alone.total == 10
    assert {share.who: share.cost for share in alone.shares} == {"a": Decimal(0), "b": Decimal(10)}
    inside = bill([Fact("serve", seconds=100.0), hit, miss, hit], CostSettings(price_per_hour=3600.0))
    assert {share.who: (share.cost, share.num_cache_hits) for share in inside.shares} == {
        "a": (Decimal(0), 2),
        "b": (Decimal(100), 0),
    }
    assert inside.rates.per_request == Decimal("33.3333")
    assert inside.rates.per_computed_request == Decimal(100)


def test_users_share_idle_time_by_the_time_of_their_requests() -> None:
    facts = [
        Fact("serve", seconds=100.0),
        Fact("serve.request", seconds=3.0, who="a"),
        Fact("serve.request", seconds=1.0, who=""),
    ]
    shares = bill(facts, CostSettings(price_per_hour=36.0)).shares
    assert [(share.who, share.cost) for share in shares] == [("(unnamed)", Decimal("0.25")), ("a", Decimal("0.75"))]


def test_electricity_by_power_or_as_measured() -> None:
    prices = CostSettings(price_per_hour=0.0, electricity_price_per_kwh=0.5, power_w=400.0)
    assert bill([Fact("train", seconds=3600.0)], prices).total == Decimal("0.2")
    measured = bill([Fact("train", seconds=3600.0, energy_wh=100.0), Fact("train", seconds=3600.0)], prices)
    assert measured.total == Decimal("0.25")
    assert measured.energy_wh == 500
    assert "0.5 CNY per kWh (500.0 Wh used)" in measured.lines()[0]


def test_tenths_are_tenths() -> None:
    facts = [Fact("train", seconds=0.1)] * 36_000
    assert bill(facts, CostSettings(price_per_hour=0.1)).total == Decimal("0.1")


def test_no_facts_make_an_empty_bill() -> None:
    found = bill([], CostSettings())
    assert (found.total, found.stages, found.shares) == (0, (), ())
    assert "0.000000 CNY" in found.lines()[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": "12"}, "seconds is '12'"),
        ({"seconds": True}, "seconds is True"),
        ({"completion_tokens": 1.5}, "completion_tokens is 1.5, not a whole number"),
        ({"peak_bytes": None}, "peak_bytes is None"),
        ({"energy_wh": float("inf")}, "energy_wh is inf"),
        ({"note": [1]}, "note"),
        ({"who": 3}, "who"),
        ({"kind": 3}, "kind"),
    ],
)
def test_a_fact_that_is_no_measurement_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bill([Fact(**{"kind": "train", "at": "2025-01-01", **fields})], CostSettings())


def test_a_ledger_file_becomes_a_bill(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(Fact("train", run="r1", seconds=1800.0, trained_tokens=1000))
    ledger.append(Fact("train", run="r2", seconds=600.0))
    assert bill(ledger.read(), CostSettings(price_per_hour=6.0)).total == 4
    assert bill(ledger.read(run="r1"), CostSettings(price_per_hour=6.0)).total == 3


# --- what it looks like


@given(facts_strategy, settings_strategy)
@settings(max_examples=80, deadline=None)
def test_printed_csv_and_json_add_up_too(facts: list[Fact], prices: CostSettings) -> None:
    found = bill(facts, prices)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert rows[-1]["kind"] == "total"
    parts = [Decimal(row["cost"]) for row in rows[:-1] if row["cost"]]
    assert sum(parts, Decimal(0)) == Decimal(rows[-1]["cost"]) == found.total
    raw = json.loads(json.dumps(found.to_dict()), parse_float=Decimal)
    assert sum((Decimal(s["cost"]) for s in raw["stages"] if s["cost"] is not None), Decimal(0)) == Decimal(
        raw["total"]
    )
    table = found.lines()[1 : 3 + len(found.stages)]
    printed = [Decimal(line.split()[-1]) for line in table[1:-1] if " in " not in line]
    assert sum(printed, Decimal(0)) == Decimal(table[-1].split()[-2])


def test_lines_show_what_was_done_and_whose_price_it_was() -> None:
    facts = [
        Fact("train", seconds=3600.0, trained_tokens=12_345, peak_bytes=3_710_000_000, stored_bytes=999_999),
        Fact("serve", seconds=60.0),
        Fact("serve.request", seconds=6.0, completion_tokens=10, who="小王"),
    ]
    lines = bill(facts, CostSettings(price_per_hour=2.5, currency="USD", hardware="own box")).lines()
    assert lines[0] == "own box: 2.5 USD per hour; cost.price_per_hour"
    train = next(line for line in lines if line.startswith("train "))
    assert [train.split()[i] for i in (1, 2)] == ["3600.0", "12,345"]
    assert "3.71 GB" in train
    assert "1 MB" in train
    assert any(line.startswith("  serve.request") and line.endswith("in serve") for line in lines)
    assert lines[-1] == "小王: 1 requests, 10 answered tokens, 0.041667 USD"
    assert not any("prompt" in line for line in lines)  # a column without a figure is left out


def test_the_placeholder_price_calls_itself_one() -> None:
    assert "PLACEHOLDER" in bill([], CostSettings()).lines()[0]
    assert "PLACEHOLDER" not in bill([], CostSettings(price_per_hour=1.0)).lines()[0]
