"""Which rows make up a data set: exact arithmetic over counts. Knows no texts and no files.

Two questions: which rows to leave out so that enough of the letters are Chinese, and how many rows of each domain to
take, repeat or weigh. Every answer is a plan that can be printed before it is obeyed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Literal

import numpy as np

from pingjia.errors import DataError
from pingjia.recipe import near_miss

Method = Literal["down", "up", "weights"]


# ---- language


@dataclass(frozen=True, slots=True)
class SharePlan:
    """`drop_N`: rows to leave out so that `after` is at least the minimum. `before` and `after` are None without
    letters."""

    before: float | None
    after: float | None
    drop: np.ndarray

    @property
    def num_dropped(self) -> int:
        return int(self.drop.sum())


def share_as_it_is(num_han: int, num_letters: int, min_share: float) -> SharePlan | None:
    """The plan that leaves nothing out, if that will do."""
    wanted = _fraction(min_share)
    if num_letters and wanted.denominator * num_han < wanted.numerator * num_letters:
        return None
    share = num_han / num_letters if num_letters else None
    return SharePlan(share, share, np.zeros(0, bool))


def _fraction(share: float) -> Fraction:
    """0.7 is 7/10: whole numbers from here on."""
    return Fraction(str(share)).limit_denominator(10**6)


def plan_zh_share(han_N: np.ndarray, letters_N: np.ndarray, min_share: float) -> SharePlan:
    """The least Chinese rows, as few as will do, so that han / letters of the rest is at least `min_share`.

    Rows are left out in the order of what they cost the share (min_share * letters - han), the earlier row first among
    equals; no set of fewer rows would do. Raises DataError when not even the purest row reaches the minimum.
    """
    wanted = _fraction(min_share)
    han, letters = han_N.astype(np.int64), letters_N.astype(np.int64)
    total = int(letters.sum())
    before = int(han.sum()) / total if total else None
    drop = np.zeros(len(han), bool)
    cost = wanted.numerator * letters - wanted.denominator * han
    if not total or cost.sum() <= 0:
        return SharePlan(before, before, drop)
    order = np.argsort(-cost, kind="stable")
    left_cost, left_letters = cost.sum() - cost[order].cumsum(), total - letters[order].cumsum()
    enough = np.flatnonzero((left_cost <= 0) & (left_letters > 0))
    if not len(enough):
        raise DataError(_out_of_reach(before, min_share, han_N, letters_N))
    drop[order[: enough[0] + 1]] = True
    return SharePlan(before, int(han[~drop].sum()) / int(letters[~drop].sum()), drop)


def _out_of_reach(before: float | None, min_share: float, han_N: np.ndarray, letters_N: np.ndarray) -> str:
    best = max((h / n for h, n in zip(han_N.tolist(), letters_N.tolist(), strict=True) if n), default=0.0)
    return (
        f"{before or 0:.1%} of the letters are Chinese, and the most Chinese row alone reaches {best:.1%}: "
        f"min_zh_share {min_share:.0%} cannot be reached by leaving rows out; add Chinese rows, or lower it"
    )


# ---- domains


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One line of the table: a domain before and after. `weight`: of its rows in the loss."""

    name: str
    num_before: int
    num_after: int
    share_before: float
    share_after: float
    share_wanted: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """`times_N`: how often each row is taken (0: left out). `weight_N`: its weight in the loss."""

    table: tuple[DomainRow, ...]
    times: np.ndarray
    weight: np.ndarray

    @property
    def is_reached(self) -> bool:
        """Whether every share is what was asked for, within one row."""
        total = max(1, sum(row.num_after for row in self.table))
        if any(row.weight != 1 for row in self.table):
            return True
        return all(abs(row.share_after - row.share_wanted) * total < 1 + 1e-9 for row in self.table)

    @property
    def short(self) -> tuple[DomainRow, ...]:
        """The domains below their shares; none when the shares are reached."""
        return () if self.is_reached else tuple(row for row in self.table if row.share_after < row.share_wanted)


def plan_domains(
    domain_N: Sequence[str | None],
    target: Literal["balanced"] | Mapping[str, float],
    method: Method,
    *,
    max_repeat: int,
    seed: int,
) -> DomainPlan:
    """Bring the domains to their shares.

    down: the largest set without repeated rows; up: every row at least once, the short domains repeated up to
    `max_repeat` times; weights: all rows once, weighted so that the mean weight is 1. A domain with a share of 0 is
    left out. Rows without a domain are a domain of their own, "-". The rows drawn depend on the seed and on the rows
    of their domain alone. DataError for shares that do not fit the data.
    """
    names = [name or "-" for name in domain_N]
    counts = dict(Counter(names))
    shares = _shares(counts, target)
    if method == "weights":
        return _weighted(names, counts, shares)
    wanted = quotas_down(counts, shares) if method == "down" else quotas_up(counts, shares, max_repeat)
    times = _draw(names, wanted, seed)
    return DomainPlan(_table(counts, wanted, shares), times, np.ones(len(names)))


def _shares(counts: Mapping[str, int], target: Literal["balanced"] | Mapping[str, float]) -> dict[str, Fraction]:
    if not counts:
        raise DataError("0 rows are left to balance")
    if target == "balanced":
        return {name: Fraction(1, len(counts)) for name in counts}
    assert not isinstance(target, str)
    if missing := [name for name, share in target.items() if share > 0 and name not in counts]:
        close = near_miss(missing[0], counts)
        raise DataError(f"domains.target: no row of domain {missing[0]!r}{close}; there are {_listed(counts)}")
    if unnamed := [name for name in counts if name not in target]:
        raise DataError(
            f"domains.target: gives no share to {unnamed[0]!r} ({counts[unnamed[0]]} rows); 0 leaves a domain out"
        )
    total = sum(target.values())
    if abs(total - 1) > 1e-9:
        raise DataError(f"domains.target: the shares add up to {total:.10g}, not to 1")
    exact = {name: Fraction(target[name]).limit_denominator(10**9) for name in counts}
    return {name: share / sum(exact.values()) for name, share in exact.items()}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def quotas_down(counts: Mapping[str, int], shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Rows to take of each domain: the largest total whose shares every domain can give, shared out by largest
    remainder. The quotas add up to that total, none exceeds its domain, each is within one row of its exact share."""
    total = min(Fraction(counts[name]) / share for name, share in shares.items() if share)
    return largest_remainder(int(total), shares)


def quotas_up(counts: Mapping[str, int], shares: Mapping[str, Fraction], max_repeat: int) -> dict[str, int]:
    """Rows to take of each domain, repeated ones included: every row of a domain with a share at least once.

    The smallest total in which no domain is cut, but no row more than `max_repeat` times; where that binds, the domain
    stays below its share.
    """
    total = max(Fraction(counts[name]) / share for name, share in shares.items() if share)
    exact = largest_remainder(-int(-total // 1), shares)
    return {
        name: min(max(exact[name], counts[name]), counts[name] * max_repeat) if share else 0
        for name, share in shares.items()
    }


def largest_remainder(total: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers that add up to `total`, each the floor or the ceiling of its share (Hamilton's method)."""
    exact = {name: total * share for name, share in shares.items()}
    result = {name: int(value) for name, value in exact.items()}
    left = total - sum(result.values())
    for name in sorted(exact, key=lambda n: result[n] - exact[n])[:left]:
        result[name] += 1
    return result


def _draw(names: Sequence[str], wanted: Mapping[str, int], seed: int) -> np.ndarray:
    """How often each row is taken: whole rounds of a domain, and the rest drawn without putting back."""
    times = np.zeros(len(names), np.int64)
    for name, rows in _rows_by_domain(names).items():
        rounds, rest = divmod(wanted[name], len(rows))
        times[rows] = rounds
        name_seed = int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        times[np.random.default_rng([seed, name_seed]).permutation(rows)[:rest]] += 1
    return times


def _rows_by_domain(names: Sequence[str]) -> dict[str, np.ndarray]:
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    number_N = np.fromiter((number[name] for name in names), np.int32, len(names))
    order = np.argsort(number_N, kind="stable")
    ends = np.bincount(number_N, minlength=len(number)).cumsum()
    return dict(zip(number, np.split(order, ends[:-1]), strict=True))


def _weighted(names: Sequence[str], counts: Mapping[str, int], shares: Mapping[str, Fraction]) -> DomainPlan:
    before = sum(counts.values())
    after = {name: count if shares[name] else 0 for name, count in counts.items()}
    total = sum(after.values())  # of the rows that are trained on: their mean weight is 1
    weights = {name: float(shares[name] * total / counts[name]) for name in counts}
    table = tuple(
        DomainRow(n, c, after[n], c / before, float(shares[n]), float(shares[n]), weights[n]) for n, c in counts.items()
    )
    weight = np.array([weights[name] for name in names])
    return DomainPlan(table, (weight > 0).astype(np.int64), weight)


def _table(
    counts: Mapping[str, int], wanted: Mapping[str, int], shares: Mapping[str, Fraction]
) -> tuple[DomainRow, ...]:
    before, after = sum(counts.values()), max(1, sum(wanted.values()))
    return tuple(DomainRow(n, c, wanted[n], c / before, wanted[n] / after, float(shares[n])) for n, c in counts.items())
