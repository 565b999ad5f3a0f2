"""What a key has spent this month, read from a ledger that grows, is cut, moved away or damaged."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.cost.prices import resolve
from pingjia.cost.settings import CostSettings
from pingjia.cost.spending import Spending, price_of
from pingjia.ledger import Fact, Ledger

PRICES = resolve(CostSettings(price_per_hour=3.6))  # a second costs 0.001
MAY = "2026-05-09T10:00:00.000+00:00"


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def spending(ledger):
    month = [datetime(2026, 5, 31, tzinfo=UTC)]
    result = Spending(ledger.path, PRICES, now=lambda: month[0])
    result.set_time = lambda *when: month.__setitem__(0, datetime(*when, tzinfo=UTC))
    return result


def request(seconds, who="a", **fields):
    return Fact(**{"kind": "serve.request", "at": MAY, "seconds": seconds, "who": who, **fields})


def test_no_ledger_is_nothing_spent(spending):
    assert spending.of("a").cost == 0


def test_it_follows_the_file(spending, ledger):
    for i in range(1, 4):
        ledger.append(request(100))
        assert spending.of("a").cost == Fraction(i, 10)
    assert spending.of("b").cost == 0
    assert spending.everyone()["a"].num_requests == 3


def test_the_noted_share_of_the_machine_is_what_counts(spending, ledger):
    ledger.append(request(100, note={"share_s": 25}))
    assert spending.of("a").cost == Fraction(25, 1000)


def test_cached_answers_cost_nothing(spending, ledger):
    ledger.append(request(100, note={"cache": "hit"}))
    assert (spending.of("a").cost, spending.of("a").num_cache_hits) == (0, 1)


def test_other_months_and_other_work_are_not_counted(spending, ledger):
    ledger.append(request(100, at="2026-04-30T23:59:59.999+00:00"))
    ledger.append(request(100, note={"text": "2026-05"}, at="2026-06-01T00:00:00.000+00:00"))
    ledger.append(request(100, kind="serve"))
    ledger.append(request(100, kind="train"))
    assert spending.of("a").cost == 0


def test_a_new_month_begins_at_nothing(spending, ledger):
    ledger.append(request(100))
    assert spending.of("a").cost > 0
    spending.set_time(2026, 6, 1)
    assert spending.of("a").cost == 0
    ledger.append(request(7, at="2026-06-01T00:00:01.000+00:00"))
    assert spending.of("a").cost == Fraction(7, 1000)


def test_a_line_whose_end_is_still_to_come_is_counted_once(spending, ledger):
    ledger.append(request(100))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:20])
    assert spending.of("a").num_requests == 1
    ledger.path.write_bytes(whole + whole)
    assert spending.of("a").num_requests == 2


def test_a_ledger_moved_away_stays_counted_and_its_successor_is_added(spending, ledger):
    ledger.append(request(100))
    assert spending.of("a").num_requests == 1
    ledger.path.rename(ledger.path.with_suffix(".1"))
    assert spending.of("a").num_requests == 1
    for _ in range(3):
        ledger.append(request(100))
    assert spending.of("a").num_requests == 4


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "serve.request", "at": "2026-05-01", "who": 5}',
        '{"kind": "serve.request", "at": "2026-05-01", "seconds": "9", "who": "a", "note": {"share_s": -1}}',
        '{"kind": "serve.request", "at": "2026-05-01", "note": []}',
        '"serve.request" 2026-05',
        '["request"]2026-05',
    ],
)
def test_a_damaged_line_costs_nothing_and_stops_nothing(spending, ledger, line):
    ledger.append(request(100))
    with open(ledger.path, "a") as file:
        file.write(line + "\n")
    ledger.append(request(100))
    assert spending.of("a").cost == Fraction(2, 10)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**6), st.booleans()), max_size=20))
def test_the_sum_is_exact(tmp_path_factory, rows):
    ledger = Ledger(tmp_path_factory.mktemp("s") / "l.jsonl")
    spending = Spending(ledger.path, PRICES, now=lambda: datetime(2026, 5, 2, tzinfo=UTC))
    for who, micro, cached in rows:
        ledger.append(request(micro / 1e6, who, note={"cache": "hit"} if cached else {}))
        spending.of("a")
    for who in "ab":
        expected = sum(Fraction(m, 10**9) for w, m, cached in rows if w == who and not cached)
        assert spending.of(who).cost == expected


def test_electricity():
    prices = resolve(CostSettings(price_per_hour=0, electricity_price_per_kwh=0.5, power_w=400))
    assert price_of(request(3600), prices) == Fraction(2, 10)
    assert price_of(request(3600, energy_wh=1000.0), prices) == Fraction(1, 2)
