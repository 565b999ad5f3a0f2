"""What is decided about every record, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pingjia.data.columns import at, chunks, numbers
from pingjia.data.duplicates import find_exact, find_near
from pingjia.data.leaks import NEARLY, SAME_QUESTION, SAME_ROW, find_leaks
from pingjia.data.problems import Finding
from pingjia.data.settings import DuplicateSettings, LanguageSettings
from pingjia.data.shares import DomainPlan, SharePlan, plan_zh_share, share_as_it_is
from pingjia.data.table import Table
from pingjia.errors import DataError

KEPT, OWN_FAULT, EXACT, NEAR, LEAK_ROW, LEAK_QUESTION, LEAK_NEAR, QUALITY, SHARE, BALANCE = range(10)
RULES = ("", "", "duplicate", "near_duplicate", "leak", "leak", "leak", "quality", "zh_share", "balance")
_LEAKS = {SAME_ROW: LEAK_ROW, SAME_QUESTION: LEAK_QUESTION, NEARLY: LEAK_NEAR}


@dataclass(slots=True)
class Verdicts:
    """`code_R`: why a record is left out, KEPT if it is not. `other_R`: the record, or the held-out one, it repeats.

    `times_R` and `weight_R`: how often a kept one is written, and its weight in the loss. 8 bytes a record, 12 once
    domains have weights.
    """

    code: np.ndarray
    other: np.ndarray
    times: np.ndarray
    weight: np.ndarray
    findings: dict[int, Finding] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table) -> Verdicts:
        size = len(table)
        code = np.full(size, OWN_FAULT, np.uint8)
        code[table.kept_K] = KEPT
        return cls(code, np.full(size, -1, np.int32), np.ones(size, np.int16), _all_one(size))

    def grown(self, table: Table) -> Verdicts:
        """The same verdicts with room for the records that a longer table has."""
        longer = Verdicts.of(table)
        size = len(self.code)
        longer.code[:size], longer.other[:size] = self.code, self.other
        longer.findings = self.findings
        return longer

    def alive(self) -> np.ndarray:
        """bool [R]: which are kept so far."""
        return self.code == KEPT

    def reject(self, rows: np.ndarray, code: int, other: np.ndarray | None = None) -> None:
        """Leave out `rows` that are kept so far."""
        still = self.code[rows] == KEPT
        self.code[rows[still]] = code
        if other is not None:
            self.other[rows[still]] = other[still]

    def reject_for(self, row: int, finding: Finding) -> None:
        if self.code[row] == KEPT:
            self.code[row] = QUALITY
            self.findings[row] = finding


def _all_one(size: int) -> np.ndarray:
    """float32 [size] that takes no room."""
    return np.broadcast_to(np.ones(1, np.float32), (size,))


def judge_duplicates(
    table: Table, verdicts: Verdicts, held_out: Table, settings: DuplicateSettings, first: int = 0
) -> None:
    """Leave out records from `first` on that leak into the held-out rows or repeat an earlier record."""
    kept, made = table.kept_K, table.signatures
    new = kept >= first
    if settings.leakage and len(held_out.signatures):
        where, how = find_leaks(made, held_out.signatures, settings.near)
        for kind, code in _LEAKS.items():
            leaks = new & (how == kind)
            verdicts.reject(kept[leaks], code, held_out.kept_K[where[leaks]])
    if settings.exact:
        _reject_repeated(kept, find_exact(made, at(verdicts.alive(), kept)), new, verdicts, EXACT)
    if settings.near is not None and not first:
        _reject_repeated(kept, find_near(made, settings.near, at(verdicts.alive(), kept)), new, verdicts, NEAR)


def _reject_repeated(kept: np.ndarray, found: np.ndarray, new: np.ndarray, verdicts: Verdicts, code: int) -> None:
    rows = numbers(new & (found >= 0))
    verdicts.reject(kept[rows], code, kept[found[rows]])


def judge_share(table: Table, verdicts: Verdicts, settings: LanguageSettings) -> SharePlan | None:
    """Leave out rows until enough of the letters are Chinese. DataError when that is to be refused, or out of reach."""
    if settings.min_zh_share is None:
        return None
    han, letters = letters_of(table, np.where(verdicts.alive(), verdicts.times, 0))
    if (plan := share_as_it_is(han, letters, settings.min_zh_share)) is not None:
        return plan
    rows = np.flatnonzero(verdicts.alive())
    times = verdicts.times[rows]
    plan = plan_zh_share(
        table.columns["han"][:][rows] * times, table.columns["letters"][:][rows] * times, settings.min_zh_share
    )
    if plan.num_dropped and settings.action == "refuse":
        raise DataError(_refused(table, rows, plan, settings.min_zh_share))
    verdicts.reject(rows[plan.drop], SHARE)
    return plan


def letters_of(table: Table, times_R: np.ndarray) -> tuple[int, int]:
    """(Chinese letters, all letters) of the records, each counted as often as `times_R` says."""
    found = np.zeros(2, np.int64)
    for chunk in chunks(len(table)):
        times = times_R[chunk]
        found += [int((table.columns[name][chunk] * times).sum(dtype=np.int64)) for name in ("han", "letters")]
    return int(found[0]), int(found[1])


def _refused(table: Table, rows: np.ndarray, plan: SharePlan, minimum: float) -> str:
    examples = ", ".join(table.where(int(row)) for row in rows[plan.drop][:5])
    return (
        f"{plan.before:.1%} of the letters are Chinese, below min_zh_share {minimum:.0%}. Leaving out the "
        f"{plan.num_dropped} least Chinese of {len(rows)} rows would make it {plan.after:.1%} (first: {examples}): "
        "prepare.languages.action=drop does that; or add Chinese rows"
    )


def apply_domains(rows: np.ndarray, verdicts: Verdicts, plan: DomainPlan) -> None:
    """Write how often and how heavily each of the alive `rows` counts; those taken 0 times are left out."""
    verdicts.times[rows] = plan.times
    if (verdicts.weight[rows] != plan.weight).any():
        verdicts.weight = np.array(verdicts.weight)  # no longer one number for all
        verdicts.weight[rows] = plan.weight
    verdicts.reject(rows[plan.times == 0], BALANCE)


def finding_of(row: int, verdicts: Verdicts, table: Table, held_out: Table) -> Finding | None:
    """Why a record is left out that has no fault of its own."""
    code, other = int(verdicts.code[row]), int(verdicts.other[row])
    if code in (KEPT, OWN_FAULT):
        return None
    if code == QUALITY:
        return verdicts.findings[row]
    return Finding(RULES[code], "row", _reason(code, other, table, held_out))


def _reason(code: int, other: int, table: Table, held_out: Table) -> str:
    if code == EXACT:
        return f"the same conversation as {table.where(other)}"
    if code == NEAR:
        return f"nearly the same as {table.where(other)}, with the same numbers and negations"
    if code == LEAK_ROW:
        return f"the held-out row {held_out.where(other)} is the same conversation"
    if code == LEAK_QUESTION:
        return f"the held-out row {held_out.where(other)} asks the same question"
    if code == LEAK_NEAR:
        return f"the held-out row {held_out.where(other)} is nearly the same"
    if code == SHARE:
        return "left out so that enough of the letters are Chinese (prepare.languages.min_zh_share)"
    return "left out so that the domains have their shares (prepare.domains.target)"
