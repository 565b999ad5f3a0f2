"""Full fine-tuning, LoRA and QLoRA beside each other: from what was measured to a table. Arithmetic only.

Not here: running anything (`cli/compare.py`), figures of other machines (`compare_elsewhere.py`), what the plan claimed
(`compare_claims.py`). Nothing in this file is estimated.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pingjia.cost.prices import Prices
from pingjia.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Point:
    """A look at the held-out rows. `seconds` and `tokens` are those of the updates alone, since the first one."""

    updates: float
    seconds: float
    tokens: float
    loss: float


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train, as it was run. The first point of `curve` is the network before its first update.

    `peak_bytes`: of a process of its own, libraries included. `stored_bytes`: what has to be kept to serve it, beside
    the base where it is an adapter. `trials`: held-out loss of the rates that were tried.
    """

    name: str
    rate: float
    curve: tuple[Point, ...]
    num_trainable: int
    peak_bytes: int
    stored_bytes: int
    trials: Mapping[str, float]

    @property
    def best_loss(self) -> float:
        return min(point.loss for point in self.curve)

    def to_dict(self) -> dict[str, Any]:
        curve = [{"updates": p.updates, "seconds": p.seconds, "tokens": p.tokens, "loss": p.loss} for p in self.curve]
        own = ("name", "rate", "num_trainable", "peak_bytes", "stored_bytes")
        return {key: getattr(self, key) for key in own} | {"trials": dict(self.trials), "curve": curve}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Arm:
        return cls(**{**value, "curve": tuple(Point(**point) for point in value["curve"])})


@dataclass(frozen=True, slots=True)
class Serving:
    """One way to answer, as it was measured. Seconds are medians over the questions.

    `per_token_s`: from one token of an answer to its next. `answer_s`: a whole answer of `num_tokens`.
    `tokens_per_s`: of all answers together.
    """

    name: str
    first_token_s: float
    per_token_s: float
    answer_s: float
    num_tokens: int
    tokens_per_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the measured table. `serving`: how this arm's result answers; None where that was not measured."""

    arm: str
    rate: float
    reached: Point | None
    best_loss: float
    num_trainable: int
    stored_bytes: int
    peak_bytes: int
    money: Fraction | None
    serving: Serving | None


def common_loss(arms: Sequence[Arm], asked: float | None = None) -> float:
    """The held-out loss at which arms are compared: what was asked for, else the lowest that every arm reached.

    TrainingError when there is none: an arm did not get there, or did not get below where it began.
    """
    _require_learnt(arms)
    lowest = max(arm.best_loss for arm in arms)
    target = lowest if asked is None else asked
    short = [arm for arm in arms if arm.best_loss > target]
    if short:
        raise TrainingError(
            f"held-out loss {target:.4f} was not reached by {_losses(short)}; every arm reached {lowest:.4f}. Give "
            "more --updates, or leave --loss out to compare at that"
        )
    begun = [arm for arm in arms if arm.curve[0].loss <= target]
    if begun:
        raise TrainingError(
            f"held-out loss {target:.4f} is not below that before training ({begun[0].name} begins at "
            f"{begun[0].curve[0].loss:.4f}): there is no time to compare. Give more --updates, or another --loss"
        )
    return target


def _require_learnt(arms: Sequence[Arm]) -> None:
    for arm in arms:
        if not all(math.isfinite(point.loss) for point in arm.curve):
            raise TrainingError(f"{arm.name}: its held-out loss is no number at rate {arm.rate:g}; lower the rate")
    idle = [arm for arm in arms if not arm.best_loss < arm.curve[0].loss]
    if idle:
        before = ", ".join(f"{arm.name} {arm.curve[0].loss:.4f}" for arm in idle)
        raise TrainingError(
            f"no equal held-out loss: {_losses(idle)} at best, and before training it was {before}. Give more "
            "--updates, or another learning_rate"
        )


def _losses(arms: Sequence[Arm]) -> str:
    return ", ".join(f"{arm.name} {arm.best_loss:.4f} (rate {arm.rate:g})" for arm in arms)


def reached(curve: Sequence[Point], loss: float) -> Point | None:
    """Where the curve first goes through `loss`; straight lines between looks. None when it does not."""
    for before, after in itertools.pairwise(curve):
        if before.loss > loss >= after.loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            updates, seconds, tokens = (_between(before, after, key, share) for key in ("updates", "seconds", "tokens"))
            return Point(updates, seconds, tokens, loss)
    return None


def _between(before: Point, after: Point, key: str, share: float) -> float:
    start, end = getattr(before, key), getattr(after, key)
    return float(start + share * (end - start))


def rows(arms: Sequence[Arm], loss: float, prices: Prices, servings: Mapping[str, Serving]) -> list[Row]:
    """The measured table. `servings`: by the name of the arm."""
    found = []
    for arm in arms:
        point = reached(arm.curve, loss)
        money = None if point is None else prices.per_hour * Fraction(point.seconds).limit_denominator(10**6) / 3600
        found.append(
            Row(
                arm=arm.name,
                rate=arm.rate,
                reached=point,
                best_loss=arm.best_loss,
                num_trainable=arm.num_trainable,
                stored_bytes=arm.stored_bytes,
                peak_bytes=arm.peak_bytes,
                money=money,
                serving=servings.get(arm.name),
            )
        )
    return found


HEADER = (
    "arm", "learning_rate", "best_held_out_loss", "updates_to_loss", "tokens_to_loss", "train_hours", "num_trainable",
    "stored_bytes", "peak_bytes", "money", "first_token_s", "per_token_s",
)  # fmt: skip


def as_values(row: Row) -> dict[str, Any]:
    """Plain numbers, None where nothing was measured; the keys are HEADER."""
    point, serving = row.reached, row.serving
    values = (
        row.arm,
        row.rate,
        round(row.best_loss, 5),
        None if point is None else round(point.updates, 2),
        None if point is None else round(point.tokens),
        None if point is None else round(point.seconds / 3600, 6),
        row.num_trainable,
        row.stored_bytes,
        row.peak_bytes,
        None if row.money is None else round(float(row.money), 6),
        None if serving is None else round(serving.first_token_s, 5),
        None if serving is None else round(serving.per_token_s, 6),
    )
    return dict(zip(HEADER, values, strict=True))


def to_csv(found: Sequence[Row]) -> str:
    """The measured table alone: what is extrapolated never stands in the same file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_values(row) for row in found)
    return text.getvalue()
