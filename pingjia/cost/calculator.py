"""What a run and a year would cost: a calculator over stated assumptions, each with where it comes from.

Figures that a ledger measured are taken from it, the user's own win, and what is left is a default that the result
names as assumed. Arithmetic only; what really was spent is `bill.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from pingjia.cost.prices import Prices, exact
from pingjia.cost.stages import billed_seconds, is_cache_hit, is_request
from pingjia.errors import RecipeError
from pingjia.ledger import Fact
from pingjia.recipe import Section

HOURS_PER_YEAR = 24 * 365
DAYS_PER_YEAR = 365
RUN_BUDGET = 1000  # what a run may cost, in the currency of the prices: the plan's "about a thousand yuan"
Origin = Literal["given", "measured", "assumed"]


class Assumptions(Section):
    """What a year looks like. None: from the ledger where it knows, else the default of DEFAULTS.

    training_hours: of one run. runs_per_year: how often it is tuned anew. users, requests_per_user_per_day: who asks.
    answer_seconds: machine time of one computed answer, shared with the others of its batch. cached_share: of the
    requests, answered from the cache. busy_share: at most so much of the time a machine shall be working.
    stored_gb, storage_price_per_gb_month: what is kept, and what that costs (0: your own disk).
    """

    training_hours: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    runs_per_year: float = Field(default=12, ge=0, allow_inf_nan=False)
    users: int = Field(default=100, ge=1)
    requests_per_user_per_day: float = Field(default=10, ge=0, allow_inf_nan=False)
    answer_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    cached_share: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    busy_share: float = Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    stored_gb: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    storage_price_per_gb_month: float = Field(default=0, ge=0, allow_inf_nan=False)


DEFAULTS: Mapping[str, float] = {"training_hours": 10, "answer_seconds": 1, "cached_share": 0, "stored_gb": 20}


@dataclass(frozen=True, slots=True)
class Assumed:
    """One figure and whose it is."""

    name: str
    value: float
    origin: Origin


@dataclass(frozen=True, slots=True)
class Estimate:
    """Money in the currency of the prices.

    per_request and per_user_year_by_use: machines are paid while they work. per_user_year_always_on: `num_machines` run
    all year, whether asked or not. Tuning and storage of a year are in both.
    """

    assumptions: tuple[Assumed, ...]
    currency: str
    price_per_hour: float
    power_price_per_hour: float
    price_source: str
    per_run: float
    tuning_per_year: float
    storage_per_year: float
    per_request: float
    serving_hours_per_year: float
    num_machines: int
    per_user_year_by_use: float
    per_user_year_always_on: float

    @property
    def hours_within_budget(self) -> float | None:
        """Hours of training that RUN_BUDGET buys; None where an hour costs nothing."""
        hour = self.price_per_hour + self.power_price_per_hour
        return RUN_BUDGET / hour if hour else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        figures = {name: getattr(self, name) for name in self.__slots__ if name != "assumptions"}
        assumed = {a.name: {"value": a.value, "origin": a.origin} for a in self.assumptions}
        return {"assumptions": assumed, **figures, "hours_within_budget": self.hours_within_budget}

    def lines(self) -> list[str]:
        """For a terminal: assumptions, results, and the budget of a run beside them."""
        width = max(len(a.name) for a in self.assumptions)
        found = ["assumptions:", *(f"  {a.name:<{width}}  {a.value:g} ({a.origin})" for a in self.assumptions)]
        hour = (
            f"{self.price_per_hour:g} + {self.power_price_per_hour:g} for electricity"
            if self.power_price_per_hour
            else f"{self.price_per_hour:g}"
        )
        found += [f"  an hour costs {hour} {self.currency}; {self.price_source}", "results:"]
        results = [
            ("one run", f"{self.per_run:.2f}"),
            ("tuning, a year", f"{self.tuning_per_year:.2f}"),
            ("storage, a year", f"{self.storage_per_year:.2f}"),
            ("one request", f"{self.per_request:.6f}"),
            ("user and year, machines paid while they work", f"{self.per_user_year_by_use:.4f}"),
            (f"user and year, {self.num_machines} machine(s) always on", f"{self.per_user_year_always_on:.4f}"),
        ]
        width = max(len(name) for name, _ in results)
        found += [f"  {name:<{width}}  {value} {self.currency}" for name, value in results]
        return [*found, self._budget()]

    def _budget(self) -> str:
        if self.hours_within_budget is None:
            return "an hour costs nothing here, so any run fits a budget"
        hours = next(a.value for a in self.assumptions if a.name == "training_hours")
        fits = "fits in" if self.per_run <= RUN_BUDGET else "is over"
        bought = f"{RUN_BUDGET} {self.currency} buy {self.hours_within_budget:.1f} hours"
        return f"{bought}; a run of {hours:g} hours {fits} that"


def estimate(given: Assumptions, prices: Prices, facts: Iterable[Fact] = ()) -> Estimate:
    """A year under the assumptions. Raises RecipeError where the hours asked for are more than a float can hold."""
    assumed = _resolve(given, _measured(facts))
    at = {a.name: exact(a.value) for a in assumed}
    power_hour = prices.per_kwh * (prices.power_w or 0) / 1000
    hour = prices.per_hour + power_hour
    per_run = at["training_hours"] * hour
    requests = at["users"] * at["requests_per_user_per_day"] * DAYS_PER_YEAR
    computed_hours = requests * (1 - at["cached_share"]) * at["answer_seconds"] / 3600
    num_machines = max(1, -(-computed_hours // (HOURS_PER_YEAR * at["busy_share"])))
    tuning = per_run * at["runs_per_year"]
    storage = at["stored_gb"] * at["storage_price_per_gb_month"] * 12
    always_on = num_machines * HOURS_PER_YEAR * prices.per_hour + computed_hours * power_hour
    return Estimate(
        assumptions=assumed,
        currency=prices.currency,
        price_per_hour=_float(prices.per_hour),
        power_price_per_hour=_float(power_hour),
        price_source=prices.source,
        per_run=_float(per_run),
        tuning_per_year=_float(tuning),
        storage_per_year=_float(storage),
        per_request=_float(computed_hours * hour / requests if requests else Fraction(0)),
        serving_hours_per_year=_float(computed_hours),
        num_machines=int(num_machines),
        per_user_year_by_use=_float((tuning + storage + computed_hours * hour) / at["users"]),
        per_user_year_always_on=_float((tuning + storage + always_on) / at["users"]),
    )


def _resolve(given: Assumptions, measured: Mapping[str, float]) -> tuple[Assumed, ...]:
    return tuple(_assumed(name, getattr(given, name), name in given.model_fields_set, measured) for name in _ORDER)


_ORDER = (
    "training_hours", "runs_per_year", "users", "requests_per_user_per_day", "answer_seconds", "cached_share",
    "busy_share", "stored_gb", "storage_price_per_gb_month",
)  # fmt: skip


def _assumed(name: str, value: float | None, is_given: bool, measured: Mapping[str, float]) -> Assumed:
    if is_given and value is not None:
        return Assumed(name, value, "given")
    if name in measured:
        return Assumed(name, measured[name], "measured")
    return Assumed(name, value if value is not None else DEFAULTS[name], "assumed")


def _measured(facts: Iterable[Fact]) -> dict[str, float]:
    """What a ledger knows: mean hours of its runs, what they store, machine time and cached share of its requests."""
    training: dict[str, Fraction] = {}
    requests: list[Fact] = []
    stored: dict[str, int] = {}
    for fact in facts:
        if fact.kind == "train" or fact.kind.startswith("train."):
            training[fact.run] = training.get(fact.run, Fraction(0)) + exact(fact.seconds)
            stored[fact.run] = max(stored.get(fact.run, 0), fact.stored_bytes)
        elif is_request(fact):
            requests.append(fact)
    found: dict[str, float] = {}
    if training:
        found["training_hours"] = _float(sum(training.values(), Fraction(0)) / len(training) / 3600)
    if sum(stored.values()):
        found["stored_gb"] = sum(stored.values()) / 1e9
    computed = [fact for fact in requests if not is_cache_hit(fact)]
    if computed:
        found["answer_seconds"] = _float(sum(map(_machine_seconds, computed), Fraction(0)) / len(computed))
        found["cached_share"] = (len(requests) - len(computed)) / len(requests)
    return found


def _machine_seconds(fact: Fact) -> Fraction:
    """Its share of the machine, where the gateway noted one; else all of its time."""
    share = fact.note.get("share_s")
    return exact(share) if isinstance(share, int | float) else billed_seconds(fact)


def _float(value: Fraction | int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RecipeError("these assumptions make more money than a number can hold; check their units") from None
