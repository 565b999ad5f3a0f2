"""A bill taken apart by run, key, month or request. Every part adds up to the bill's total, to the last digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pingjia.cost.bill import UNNAMED, apportion, priced_stages, units_of, weights_of
from pingjia.cost.settings import CostSettings
from pingjia.cost.stages import Stage, billed_seconds, is_cache_hit, is_request
from pingjia.ledger import Fact

By = Literal["run", "who", "month", "request"]
_NO_ONE = "(no request)"


@dataclass(frozen=True, slots=True)
class Part:
    """What one run, key, month or request took. `seconds` are those billed; of a request, its share of the machine."""

    name: str
    num_requests: int
    num_cache_hits: int
    prompt_tokens: int
    completion_tokens: int
    trained_tokens: int
    seconds: float
    cost: Decimal

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            name: float(value) if isinstance(value := getattr(self, name), Decimal) else value
            for name in self.__slots__
        }


def breakdown(facts: Iterable[Fact], settings: CostSettings, by: By) -> list[Part]:
    """The parts, dearest first; of requests, in the order of the ledger.

    The cost of a stage with requests is shared among them by the time each ran, its idle time too; that of another
    stage among its facts. Raises what `bill` raises.
    """
    found, units = priced_stages(facts, settings)
    priced = [one for stage, part in zip(found, units, strict=True) for one in _spread(stage, part)]
    groups: dict[str, list[tuple[Fact, int]]] = {}
    for number, (fact, part) in enumerate(priced, start=1):
        groups.setdefault(_name(fact, by, number), []).append((fact, part))
    parts = [_part(name, some) for name, some in groups.items()]
    return parts if by == "request" else sorted(parts, key=lambda part: -part.cost)


def to_csv(parts: Sequence[Part], currency: str) -> str:
    """One row per part; the header names the columns."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*Part.__slots__, "currency"], lineterminator="\n")
    writer.writeheader()
    for part in parts:
        writer.writerow({**part.to_dict(), "cost": f"{part.cost:f}", "currency": currency})
    return buffer.getvalue()


def _spread(stage: Stage, units: int) -> list[tuple[Fact, int]]:
    facts = stage.requests or list(stage.facts)
    return list(zip(facts, apportion(units, weights_of(facts)), strict=True))


def _name(fact: Fact, by: By, number: int) -> str:
    if by == "run":
        return fact.run or UNNAMED
    if by == "month":
        return fact.at[:7] or UNNAMED
    if by == "who":
        return fact.who or UNNAMED if is_request(fact) else _NO_ONE
    label = str(fact.note.get("id") or number) if is_request(fact) else f"{fact.kind} {number}"
    return f"{fact.at} {label}".strip()


def _part(name: str, priced: Sequence[tuple[Fact, int]]) -> Part:
    facts = [fact for fact, _ in priced]
    return Part(
        name=name,
        num_requests=sum(fact.num_requests or 1 for fact in facts if is_request(fact)),
        num_cache_hits=sum(map(is_cache_hit, facts)),
        prompt_tokens=sum(fact.prompt_tokens for fact in facts),
        completion_tokens=sum(fact.completion_tokens for fact in facts),
        trained_tokens=sum(fact.trained_tokens for fact in facts),
        seconds=float(sum(map(billed_seconds, facts))),
        cost=units_of(sum(part for _, part in priced)),
    )
