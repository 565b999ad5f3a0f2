"""Shares and quotas, exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.shares import largest_remainder, plan_domains, plan_zh_share, quotas_down, quotas_up
from pingjia.errors import DataError

ROWS = st.lists(st.integers(0, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=9)
COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    han, letters = zip(*rows, strict=True) if rows else ((), ())
    return np.array(han, np.uint32), np.array(letters, np.uint32)


def share(han: np.ndarray, letters: np.ndarray, keep: np.ndarray) -> Fraction | None:
    total = int(letters[keep].sum())
    return Fraction(int(han[keep].sum()), total) if total else None


@given(ROWS, st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 1.0]))
def test_the_share_is_reached_with_the_fewest_rows(rows: list[tuple[int, int]], minimum: float) -> None:
    """Against trying every set of rows."""
    han, letters = columns(rows)
    everything = share(han, letters, np.ones(len(rows), bool))

    def is_enough(dropped: tuple[int, ...]) -> bool:
        keep = np.array([i not in dropped for i in range(len(rows))], bool)
        kept = share(han, letters, keep)
        return kept is not None and kept >= Fraction(minimum)

    if everything is None:
        assert plan_zh_share(han, letters, minimum).num_dropped == 0
        return
    fewest = next((n for n in range(len(rows)) if any(is_enough(c) for c in combinations(range(len(rows)), n))), None)
    if fewest is None:
        with pytest.raises(DataError, match="cannot be reached by leaving rows out"):
            plan_zh_share(han, letters, minimum)
        return
    plan = plan_zh_share(han, letters, minimum)
    assert plan.num_dropped == fewest
    assert is_enough(tuple(np.flatnonzero(plan.drop)))
    assert plan.after == pytest.approx(float(share(han, letters, ~plan.drop) or 0))
    assert plan.before == pytest.approx(float(everything))


def test_the_least_chinese_rows_go() -> None:
    han, letters = np.array([10, 0, 9, 2]), np.array([10, 10, 10, 10])
    plan = plan_zh_share(han, letters, 0.7)
    assert plan.drop.tolist() == [False, True, False, False]
    assert (plan.before, plan.after) == (21 / 40, 0.7)


def test_a_share_out_of_reach_says_the_numbers() -> None:
    with pytest.raises(
        DataError, match=r"25\.0% of the letters are Chinese, and the most Chinese row alone reaches 40\.0%"
    ):
        plan_zh_share(np.array([4, 1]), np.array([10, 10]), 0.7)


@given(COUNTS, st.integers(0, 500), st.data())
def test_quotas_add_up_and_are_floor_or_ceiling(counts: dict[str, int], total: int, data: st.DataObject) -> None:
    parts = {name: data.draw(st.integers(0, 20), label=name) for name in counts}
    whole = sum(parts.values())
    if not whole:
        return
    shares = {name: Fraction(part, whole) for name, part in parts.items()}
    quotas = largest_remainder(total, shares)
    assert sum(quotas.values()) == total
    assert all(abs(quotas[name] - total * shares[name]) < 1 for name in counts)


@given(COUNTS)
def test_down_takes_the_most_that_is_balanced(counts: dict[str, int]) -> None:
    shares = {name: Fraction(1, len(counts)) for name in counts}
    quotas = quotas_down(counts, shares)
    smallest = min(counts.values())
    assert all(0 <= quotas[name] <= counts[name] for name in counts)
    assert sum(quotas.values()) == smallest * len(counts)
    assert set(quotas.values()) == {smallest}


@given(COUNTS, st.data())
def test_down_never_takes_more_than_there_is(counts: dict[str, int], data: st.DataObject) -> None:
    parts = {name: data.draw(st.integers(1, 20), label=name) for name in counts}
    shares = {name: Fraction(part, sum(parts.values())) for name, part in parts.items()}
    quotas = quotas_down(counts, shares)
    total = sum(quotas.values())
    assert all(quotas[name] <= counts[name] for name in counts)
    assert any((total + 1) * shares[name] > counts[name] for name in counts)  # one more row would not do


@given(COUNTS, st.integers(1, 5))
def test_up_keeps_every_row_and_repeats_none_too_often(counts: dict[str, int], max_repeat: int) -> None:
    shares = {name: Fraction(1, len(counts)) for name in counts}
    quotas = quotas_up(counts, shares, max_repeat)
    largest = max(counts.values())
    assert all(counts[n] <= quotas[n] <= counts[n] * max_repeat for n in counts)
    assert all(quotas[n] == min(largest, counts[n] * max_repeat) for n in counts)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=60), st.integers(0, 99))
def test_a_plan_takes_what_its_table_says(domains: list[str | None], seed: int) -> None:
    for method in ("down", "up"):
        plan = plan_domains(domains, "balanced", method, max_repeat=3, seed=seed)  # type: ignore[arg-type]
        for row in plan.table:
            mine = [t for t, d in zip(plan.times, domains, strict=True) if (d or "-") == row.name]
            assert sum(mine) == row.num_after
            assert max(mine) - min(mine) <= 1  # no row is taken twice before all are taken once
        again = plan_domains(domains, "balanced", method, max_repeat=3, seed=seed)  # type: ignore[arg-type]
        assert again.times.tolist() == plan.times.tolist()


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60))
def test_weights_bring_every_domain_to_its_share(domains: list[str]) -> None:
    plan = plan_domains(domains, "balanced", "weights", max_repeat=1, seed=0)
    assert plan.weight.mean() == pytest.approx(1)
    names = set(domains)
    for name in names:
        mine = sum(w for w, d in zip(plan.weight, domains, strict=True) if d == name)
        assert mine / plan.weight.sum() == pytest.approx(1 / len(names))
    assert plan.times.tolist() == [1] * len(domains)


def test_given_shares_and_a_domain_left_out() -> None:
    plan = plan_domains(
        ["a"] * 10 + ["b"] * 10 + ["c"] * 5, {"a": 0.75, "b": 0.25, "c": 0}, "down", max_repeat=1, seed=1
    )
    assert {r.name: r.num_after for r in plan.table} == {"a": 10, "b": 3, "c": 0}
    assert plan.is_reached


def test_what_max_repeat_does_not_reach_is_told() -> None:
    plan = plan_domains(["a"] * 30 + ["b"] * 2, "balanced", "up", max_repeat=3, seed=1)
    assert {r.name: r.num_after for r in plan.table} == {"a": 30, "b": 6}
    assert not plan.is_reached


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": 0.5, "x": 0.5}, r"no row of domain 'x'; there are a \(2\), b \(1\)"),
        ({"a": 1.0}, r"gives no share to 'b' \(1 rows\); 0 leaves a domain out"),
        ({"a": 0.5, "b": 0.4}, r"the shares add up to 0\.9, not to 1"),
    ],
)
def test_shares_that_do_not_fit(target: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_domains(["a", "a", "b"], target, "down", max_repeat=1, seed=0)
