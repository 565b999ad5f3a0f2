"""Facts of a ledger -> stages of work, each second in exactly one of them. No prices here.

The rule against counting twice: a kind that is a dotted child of a kind also present as a span (with seconds) is
itemised under it, not added. So while "serve" reports the time a server ran, "serve.request" says what that time was
spent on; without a "serve" span the requests' own seconds are added up (which counts overlapping requests each).
A request answered from the cache took no machine time worth billing: its seconds are not billed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pingjia.cost.prices import exact
from pingjia.errors import DataError
from pingjia.ledger import Fact

_SUMMED = (
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "trained_tokens",
    "learnt_tokens",
    "num_requests",
    "num_cache_hits",
    "stored_bytes",
)
_MEASURED = ("seconds", *_SUMMED[:6], "peak_bytes", "stored_bytes", "energy_wh")


@dataclass(frozen=True, slots=True)
class Stage:
    """All facts of one kind. `peak_bytes` is the largest, the other measures are sums.

    A measure that the kind's own facts do not give is taken from the stages itemised under it (`items`), except
    `seconds` and the energy, which are its own. `requests` are the request facts of the stage and its items.
    """

    kind: str
    facts: tuple[Fact, ...]
    items: tuple[Stage, ...]
    seconds: Fraction
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    trained_tokens: int
    learnt_tokens: int
    num_requests: int
    num_cache_hits: int
    peak_bytes: int
    stored_bytes: int

    @property
    def requests(self) -> list[Fact]:
        own = [fact for fact in self.facts if is_request(fact)]
        return own + [fact for item in self.items for fact in item.requests]


def stages(facts: Iterable[Fact]) -> list[Stage]:
    """The stages that are added, in the order in which their kinds first appear. Raises DataError for a bad fact."""
    by_kind: dict[str, list[Fact]] = {}
    for fact in facts:
        _check(fact)
        by_kind.setdefault(fact.kind, []).append(fact)
    spans = {kind for kind, found in by_kind.items() if _billed_seconds(found) > 0}
    parents = {kind: _parent(kind, spans) for kind in by_kind}

    def stage(kind: str) -> Stage:
        items = tuple(stage(child) for child, parent in parents.items() if parent == kind)
        return _stage(kind, by_kind[kind], items)

    return [stage(kind) for kind, parent in parents.items() if parent is None]


def is_request(fact: Fact) -> bool:
    """Whether the fact is one answered request: its kind ends in "request"."""
    return fact.kind.rpartition(".")[2] == "request"


def is_cache_hit(fact: Fact) -> bool:
    """Whether the answer came from the gateway's cache: `note` says {"cache": "hit"}."""
    return fact.note.get("cache") == "hit"


def billed_seconds(fact: Fact) -> Fraction:
    """The fact's own time; none for a cache hit."""
    return Fraction(0) if is_cache_hit(fact) else exact(fact.seconds)


def _billed_seconds(facts: Iterable[Fact]) -> Fraction:
    return sum((billed_seconds(fact) for fact in facts), Fraction(0))


def _parent(kind: str, spans: set[str]) -> str | None:
    """The nearest span that `kind` is a dotted child of."""
    parts = kind.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in spans), None)


def _stage(kind: str, facts: Sequence[Fact], items: tuple[Stage, ...]) -> Stage:
    own = {name: sum(_measure(fact, name) for fact in facts) for name in _SUMMED}
    summed = {name: value or sum(getattr(item, name) for item in items) for name, value in own.items()}
    peak = max([fact.peak_bytes for fact in facts] + [item.peak_bytes for item in items])
    return Stage(kind=kind, facts=tuple(facts), items=items, seconds=_billed_seconds(facts), peak_bytes=peak, **summed)


def _measure(fact: Fact, name: str) -> int:
    if name == "num_cache_hits":
        return int(is_cache_hit(fact))
    if name == "num_requests":
        return fact.num_requests or int(is_request(fact))
    value: int = getattr(fact, name)
    return value


def _check(fact: Fact) -> None:
    if not isinstance(fact.kind, str) or not isinstance(fact.note, dict) or not isinstance(fact.who, str):
        raise DataError(
            f"ledger: a fact at {fact.at or 'an unknown time'} has no text as kind or who, or a note "
            "that is no mapping; correct or remove its line"
        )
    for name in _MEASURED:
        value: Any = getattr(fact, name)
        whole = name not in ("seconds", "energy_wh")
        if not _is_measure(value, whole=whole):
            kind = "whole number" if whole else "number"
            raise DataError(
                f"ledger: fact {fact.kind} at {fact.at or 'an unknown time'}: {name} is {value!r}, not a {kind} "
                "of at least 0; correct or remove its line"
            )


def _is_measure(value: Any, *, whole: bool) -> bool:
    types = int if whole else (int, float)
    return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
