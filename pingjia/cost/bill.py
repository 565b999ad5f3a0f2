"""Facts and prices -> money. Arithmetic only: exact fractions inside, millionths of the currency outside.

Rounded once, at the total; parts are then shares of that total, so every column adds up to its last line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from pingjia.cost.prices import Prices, exact, resolve
from pingjia.cost.settings import CostSettings
from pingjia.cost.stages import Stage, billed_seconds, is_cache_hit, stages
from pingjia.ledger import Fact

DECIMALS = 6
_UNIT = 10**DECIMALS
UNNAMED = "(unnamed)"


@dataclass(frozen=True, slots=True)
class Line:
    """One stage and what it cost. `included_in` names the span it is itemised under; its cost is then None."""

    kind: str
    seconds: Decimal
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    trained_tokens: int
    learnt_tokens: int
    num_requests: int
    num_cache_hits: int
    peak_bytes: int
    stored_bytes: int
    cost: Decimal | None
    included_in: str | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What one key or user asked for, and their part of the serving cost (idle time shared like busy time)."""

    who: str
    num_requests: int
    num_cache_hits: int
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal


@dataclass(frozen=True, slots=True)
class Rates:
    """Unit costs, to six significant digits; None where nothing of the kind was done.

    Answered tokens and requests are those of "serve" stages; `per_request` counts cached answers too,
    `per_computed_request` does not.
    """

    per_1k_trained_tokens: Decimal | None
    per_1k_learnt_tokens: Decimal | None
    per_1k_answered_tokens: Decimal | None
    per_request: Decimal | None
    per_computed_request: Decimal | None


@dataclass(frozen=True, slots=True)
class Bill:
    """The cost of some work. Costs of `stages` that are not itemised add up to `total`, to the last digit."""

    currency: str
    price_per_hour: Decimal
    price_per_kwh: Decimal
    price_source: str
    hardware: str
    stages: tuple[Line, ...]
    shares: tuple[Share, ...]
    rates: Rates
    seconds: Decimal
    energy_wh: Decimal
    peak_bytes: int
    stored_bytes: int
    total: Decimal

    def lines(self) -> list[str]:
        """The bill for a terminal."""
        return [self._heading(), *_aligned([_COLUMNS, *map(_row, self.stages), self._last_row()]), *self._rate_lines()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; money as numbers with at most six decimals."""
        plain = {name: getattr(self, name) for name in ("currency", "price_source", "hardware")}
        numbers = ("price_per_hour", "price_per_kwh", "seconds", "energy_wh", "peak_bytes", "stored_bytes", "total")
        return {
            **plain,
            **{name: _plain(getattr(self, name)) for name in numbers},
            "stages": [_fields(line) for line in self.stages],
            "shares": [_fields(share) for share in self.shares],
            "rates": _fields(self.rates),
        }

    def to_csv(self) -> str:
        """One row per stage, then the total; the header names the columns."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*Line.__slots__, "currency"], restval="", lineterminator="\n")
        writer.writeheader()
        for line in self.stages:
            writer.writerow({**_fields(line), "cost": _money(line.cost), "currency": self.currency})
        totals = {name: _plain(getattr(self, name)) for name in ("seconds", "peak_bytes", "stored_bytes")}
        writer.writerow({"kind": "total", **totals, "cost": _money(self.total), "currency": self.currency})
        return buffer.getvalue()

    def _heading(self) -> str:
        hardware = f"{self.hardware}: " if self.hardware else ""
        prices = f"{self.price_per_hour.normalize():f} {self.currency} per hour"
        if self.price_per_kwh:
            prices += f" + {self.price_per_kwh.normalize():f} {self.currency} per kWh ({self.energy_wh:.1f} Wh used)"
        return f"{hardware}{prices}; {self.price_source}"

    def _last_row(self) -> list[str]:
        middle = ["", "", "", "", ""]
        sizes = [_bytes(self.peak_bytes), _bytes(self.stored_bytes)]
        return ["total", f"{self.seconds:.1f}", *middle, *sizes, f"{_money(self.total)} {self.currency}"]

    def _rate_lines(self) -> list[str]:
        names = {
            "per_1k_trained_tokens": "per 1,000 trained tokens",
            "per_1k_learnt_tokens": "per 1,000 learnt tokens",
            "per_1k_answered_tokens": "per 1,000 answered tokens",
            "per_request": "per request, cached ones included",
            "per_computed_request": "per computed request",
        }
        known = [(text, getattr(self.rates, name)) for name, text in names.items()]
        found = [f"{text}: {value:f} {self.currency}" for text, value in known if value is not None]
        return found + [_share_line(share, self.currency) for share in self.shares]


def bill(facts: Iterable[Fact], settings: CostSettings) -> Bill:
    """Price the facts. Every second of an added stage costs price_per_hour / 3600, plus its electricity.

    Reads the price file when the settings name one. Raises DataError for a fact that is no measurement, RecipeError
    for prices that cannot be used. No facts make a bill of 0.
    """
    prices = resolve(settings)
    found = stages(facts)
    costs = [_cost(stage, prices) for stage in found]
    units = _units(costs)
    total = sum(units)
    return Bill(
        currency=prices.currency,
        price_per_hour=_decimal(prices.per_hour),
        price_per_kwh=_decimal(prices.per_kwh),
        price_source=prices.source,
        hardware=prices.hardware,
        stages=tuple(line for stage, part in zip(found, units, strict=True) for line in _lines(stage, part)),
        shares=_shares(found, units),
        rates=_rates(found, costs),
        seconds=_decimal(sum((stage.seconds for stage in found), Fraction(0))),
        energy_wh=_decimal(sum((_energy_wh(stage, prices) for stage in found), Fraction(0))),
        peak_bytes=max((stage.peak_bytes for stage in found), default=0),
        stored_bytes=sum(stage.stored_bytes for stage in found),
        total=units_of(total),
    )


def priced_stages(facts: Iterable[Fact], settings: CostSettings) -> tuple[list[Stage], list[int]]:
    """The stages of `bill` and what each costs, in millionths of the currency."""
    prices = resolve(settings)
    found = stages(facts)
    return found, _units([_cost(stage, prices) for stage in found])


def _units(costs: Sequence[Fraction]) -> list[int]:
    return apportion(round(sum(costs, Fraction(0)) * _UNIT), costs)


def apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Split `total` in proportion to `weights` so that the parts add up to it exactly (largest remainder).

    Each part is within 1 of its exact share. Weights of 0 get 0; with no weight at all every part is 0.
    """
    whole = sum(weights, Fraction(0))
    if not whole:
        return [0] * len(weights)
    exact_parts = [total * weight / whole for weight in weights]
    parts = [int(part) for part in exact_parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact_parts[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _cost(stage: Stage, prices: Prices) -> Fraction:
    return stage.seconds * prices.per_hour / 3600 + _energy_wh(stage, prices) * prices.per_kwh / 1000


def _energy_wh(stage: Stage, prices: Prices) -> Fraction:
    """Measured energy where a fact has it, else power over its time, else nothing."""
    power_w = prices.power_w or Fraction(0)
    parts = (exact(fact.energy_wh) or billed_seconds(fact) * power_w / 3600 for fact in stage.facts)
    return sum(parts, Fraction(0))


def _lines(stage: Stage, units: int | None, included_in: str | None = None) -> list[Line]:
    line = Line(
        kind=stage.kind,
        seconds=_decimal(stage.seconds),
        prompt_tokens=stage.prompt_tokens,
        completion_tokens=stage.completion_tokens,
        cached_tokens=stage.cached_tokens,
        trained_tokens=stage.trained_tokens,
        learnt_tokens=stage.learnt_tokens,
        num_requests=stage.num_requests,
        num_cache_hits=stage.num_cache_hits,
        peak_bytes=stage.peak_bytes,
        stored_bytes=stage.stored_bytes,
        cost=None if units is None else units_of(units),
        included_in=included_in,
    )
    return [line, *(part for item in stage.items for part in _lines(item, None, stage.kind))]


def _shares(found: Sequence[Stage], units: Sequence[int]) -> tuple[Share, ...]:
    requests: list[tuple[Fact, int]] = []
    for stage, part in zip(found, units, strict=True):
        asked = stage.requests
        requests += zip(asked, apportion(part, weights_of(asked)), strict=True)
    by_who: dict[str, list[tuple[Fact, int]]] = {}
    for fact, part in requests:
        by_who.setdefault(fact.who or UNNAMED, []).append((fact, part))
    return tuple(_share(who, some) for who, some in sorted(by_who.items()))


def weights_of(requests: Sequence[Fact]) -> list[Fraction]:
    """How a cost is shared: by the time each fact took; equally where no time was noted. Cache hits weigh nothing."""
    weights = [billed_seconds(fact) for fact in requests]
    return weights if any(weights) else [Fraction(not is_cache_hit(fact)) for fact in requests]


def _share(who: str, requests: Sequence[tuple[Fact, int]]) -> Share:
    return Share(
        who=who,
        num_requests=sum(fact.num_requests or 1 for fact, _ in requests),
        num_cache_hits=sum(is_cache_hit(fact) for fact, _ in requests),
        prompt_tokens=sum(fact.prompt_tokens for fact, _ in requests),
        completion_tokens=sum(fact.completion_tokens for fact, _ in requests),
        cost=units_of(sum(part for _, part in requests)),
    )


def _rates(found: Sequence[Stage], costs: Sequence[Fraction]) -> Rates:
    priced = list(zip(found, costs, strict=True))
    served = [(stage, cost) for stage, cost in priced if stage.kind.split(".")[0] == "serve"]
    hits = sum(stage.num_cache_hits for stage, _ in served)
    return Rates(
        per_1k_trained_tokens=_rate(priced, "trained_tokens", per=1000),
        per_1k_learnt_tokens=_rate(priced, "learnt_tokens", per=1000),
        per_1k_answered_tokens=_rate(served, "completion_tokens", per=1000),
        per_request=_rate(served, "num_requests"),
        per_computed_request=_rate(served, "num_requests", less=hits),
    )


def _rate(priced: Sequence[tuple[Stage, Fraction]], name: str, *, per: int = 1, less: int = 0) -> Decimal | None:
    """Cost of the stages that did any of it, over how much they did."""
    done = [(getattr(stage, name), cost) for stage, cost in priced if getattr(stage, name)]
    amount = sum(number for number, _ in done) - less
    if amount <= 0:
        return None
    return _decimal(per * sum((cost for _, cost in done), Fraction(0)) / amount, digits=6)


# --- numbers and text


def _decimal(value: Fraction, *, digits: int = 28) -> Decimal:
    with localcontext(prec=digits):
        return Decimal(value.numerator) / Decimal(value.denominator)


def units_of(units: int) -> Decimal:
    """Millionths as money."""
    return Decimal(units).scaleb(-DECIMALS)


def _money(value: Decimal | None) -> str:
    return "" if value is None else f"{value:.{DECIMALS}f}"


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def _fields(value: Line | Share | Rates) -> dict[str, Any]:
    return {name: _plain(getattr(value, name)) for name in value.__slots__}


_COLUMNS = [
    "stage",
    "seconds",
    "requests",
    "prompt",
    "answered",
    "trained",
    "learnt",
    "peak",
    "stored",
    "cost",
]


def _row(line: Line) -> list[str]:
    counts = (line.num_requests, line.prompt_tokens, line.completion_tokens, line.trained_tokens, line.learnt_tokens)
    sizes = [_bytes(line.peak_bytes), _bytes(line.stored_bytes)]
    name, cost = line.kind, _money(line.cost)
    if line.included_in is not None:
        name, cost = f"  {line.kind}", f"in {line.included_in}"
    return [name, f"{line.seconds:.1f}", *(f"{count:,}" if count else "" for count in counts), *sizes, cost]


def _share_line(share: Share, currency: str) -> str:
    cached = f" ({share.num_cache_hits} from the cache)" if share.num_cache_hits else ""
    return (
        f"{share.who}: {share.num_requests} requests{cached}, {share.completion_tokens:,} answered tokens, "
        f"{_money(share.cost)} {currency}"
    )


def _bytes(count: int) -> str:
    """Bytes in powers of ten, three digits: 3.71 GB."""
    if not count:
        return ""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left; columns without a figure are left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  ".join(_cell(row[i], widths[i], left=i == 0) for i in used).rstrip() for row in rows]


def _cell(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)
