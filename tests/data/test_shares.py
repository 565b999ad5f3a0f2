"""Shares and quotas, exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from random import Random

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


@st.composite
def rows_and_shares(draw: st.DrawFn) -> tuple[list[str], dict[str, float]]:
    """Domains of rows, and shares for them that are not all 0."""
    domains = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60))
    parts = {name: draw(st.integers(0, 9)) for name in dict.fromkeys(domains)}
    parts[domains[0]] += 1
    return domains, {name: part / sum(parts.values()) for name, part in parts.items()}


@given(rows_and_shares())
def test_weights_bring_every_domain_to_its_share(case: tuple[list[str], dict[str, float]]) -> None:
    domains, shares = case
    plan = plan_domains(domains, shares, "weights", max_repeat=1, seed=0)
    is_in = plan.times > 0
    assert plan.times.tolist() == [int(shares[d] > 0) for d in domains]
    assert plan.weight[is_in].mean() == pytest.approx(1)  # of the rows that are trained on
    for name, share in shares.items():
        mine = sum(w for w, d in zip(plan.weight, domains, strict=True) if d == name)
        assert mine / plan.weight.sum() == pytest.approx(share)
    assert plan.is_reached


@given(rows_and_shares(), st.integers(1, 4), st.integers(0, 9))
def test_every_plan_obeys_given_shares(case: tuple[list[str], dict[str, float]], max_repeat: int, seed: int) -> None:
    domains, shares = case
    for method in ("down", "up"):
        plan = plan_domains(domains, shares, method, max_repeat=max_repeat, seed=seed)  # type: ignore[arg-type]
        total = sum(row.num_after for row in plan.table)
        assert int(plan.times.sum()) == total
        assert sum(row.num_before for row in plan.table) == len(domains)
        assert sum(row.share_after for row in plan.table) == pytest.approx(1)
        for row in plan.table:
            assert row.share_after == pytest.approx(row.num_after / total)
            assert (row.num_after == 0) or shares[row.name] > 0
            if method == "down":
                assert abs(row.num_after - total * shares[row.name]) < 1 + 1e-9
            elif shares[row.name] > 0:
                assert row.num_before <= row.num_after <= row.num_before * max_repeat
        assert method == "up" or plan.is_reached
        assert plan.is_reached == (not plan.short)


@given(rows_and_shares(), st.sampled_from([1, 2, 4, 100_000]))
def test_up_falls_short_only_where_rows_may_not_be_repeated_more(
    case: tuple[list[str], dict[str, float]], max_repeat: int
) -> None:
    domains, shares = case
    plan = plan_domains(domains, shares, "up", max_repeat=max_repeat, seed=0)
    assert plan.is_reached or any(row.num_after == row.num_before * max_repeat for row in plan.table)
    assert all(row.share_after < row.share_wanted for row in plan.short)
    if max_repeat == 100_000:
        assert plan.is_reached


@given(rows_and_shares(), st.randoms(use_true_random=False))
def test_the_order_of_the_names_decides_nothing(case: tuple[list[str], dict[str, float]], chance: Random) -> None:
    domains, shares = case
    items = list(shares.items())
    chance.shuffle(items)
    one = plan_domains(domains, shares, "down", max_repeat=1, seed=3)
    other = plan_domains(domains, dict(items), "down", max_repeat=1, seed=3)
    assert one.times.tolist() == other.times.tolist()


def test_what_is_drawn_of_a_domain_does_not_depend_on_the_others() -> None:
    alone = plan_domains(["b"] * 40 + ["c"] * 7, "balanced", "down", max_repeat=1, seed=5)
    among = plan_domains(["a"] * 7 + ["b"] * 40 + ["c"] * 7, "balanced", "down", max_repeat=1, seed=5)
    assert among.times[7:].tolist() == alone.times.tolist()


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
    assert [row.name for row in plan.short] == ["b"]


def test_an_unknown_domain_names_its_near_miss() -> None:
    with pytest.raises(DataError, match=r"no row of domain 'retruns'; did you mean returns\?"):
        plan_domains(["returns", "shop"], {"retruns": 0.5, "shop": 0.5}, "down", max_repeat=1, seed=0)


def test_a_domain_that_is_not_there_may_have_no_share() -> None:
    plan = plan_domains(["a", "a"], {"a": 1.0, "x": 0}, "down", max_repeat=1, seed=0)
    assert [row.name for row in plan.table] == ["a"]


def test_nothing_to_balance() -> None:
    with pytest.raises(DataError, match="0 rows are left to balance"):
        plan_domains([], "balanced", "down", max_repeat=1, seed=0)


def test_the_seed_draws_other_rows_and_the_same_number() -> None:
    plans = [plan_domains(["a"] * 50 + ["b"] * 5, "balanced", "down", max_repeat=1, seed=s) for s in (1, 1, 2)]
    taken = [plan.times.tolist() for plan in plans]
    assert taken[0] == taken[1] != taken[2]
    assert [sum(t) for t in taken] == [10, 10, 10]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": 0.5, "x": 0.5}, r"no row of domain 'x'; there are a \(2\), b \(1\)"),
        ({"a": 1.0}, r"gives no share to 'b' \(1 rows\); 0 leaves a domain out"),
        ({"a": 0.5, "b": 0.4}, r"the shares add up to 0\.9, not to 1"),
        ({"a": 0.5, "b": 0.5 + 2e-9}, r"add up to 1\.000000002, not to 1"),
    ],
)
def test_shares_that_do_not_fit(target: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_domains(["a", "a", "b"], target, "down", max_repeat=1, seed=0)
