"""Which replicas get requests, from what Consul shows now and who got them before. Pure.

A registry that forgets must not empty a pool that works: whoever vanished together with Consul's memory is held for a
while, and when nobody is heard of, everybody who was there goes on (their own servers know better whether they live).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pingjia.cluster.replica import Replica, State

HOLD_S = 15.0
"""How long vanished replicas are held after Consul lost its memory: what they need to write themselves down again."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Who gets requests, by name; `remarks` say who does not although one would expect it."""

    members: tuple[Replica, ...] = ()
    remarks: tuple[str, ...] = ()


def has_forgotten(seen: Sequence[Replica], last_seen: Sequence[Replica], index: int, last_index: int) -> bool:
    """Whether Consul has lost its memory: its counter went back, or several replicas vanished at once."""
    return index < last_index or (not seen and len(last_seen) > 1)


def select(seen: Sequence[Replica], before: Sequence[Replica], *, is_holding: bool = False) -> Selection:
    """The members of the pool. `is_holding`: Consul has just lost its memory, so absence says nothing."""
    remarks: list[str] = []
    known = {r.authority for r in seen}
    held = [r for r in before if is_holding and r.authority not in known]
    passing = _one_of_each(seen, before, remarks)
    if not passing and not held:
        passing = _nobody_is_heard_of(seen, before, remarks)
    members = _of_one_model([*passing, *held], before, remarks)
    return Selection(tuple(sorted(members, key=lambda r: (r.name, r.authority))), tuple(remarks))


def _one_of_each(seen: Iterable[Replica], before: Sequence[Replica], remarks: list[str]) -> list[Replica]:
    """The passing ones; of two with one name the one that was there first."""
    first = {r.authority for r in before}
    chosen: dict[str, Replica] = {}
    addresses: set[str] = set()
    for replica in sorted(seen, key=lambda r: (r.authority not in first, r.authority)):
        if replica.state is not State.PASSING or replica.authority in addresses:
            continue
        if replica.weight < 1:
            remarks.append(f"{replica.name} at {replica.authority} has weight {replica.weight}: left out; drain it")
        elif replica.name in chosen:
            there = chosen[replica.name].authority
            remarks.append(f"two replicas are called {replica.name}: {there} stays, {replica.authority} is left out")
        else:
            chosen[replica.name] = replica
            addresses.add(replica.authority)
    return list(chosen.values())


def _nobody_is_heard_of(seen: Iterable[Replica], before: Sequence[Replica], remarks: list[str]) -> list[Replica]:
    failed = {r.authority for r in seen if r.state is State.FAILED}
    staying = [r for r in before if r.authority in failed]
    if staying:
        remarks.append(f"none of {len(staying)} replicas is heard of: all of them stay, nothing better is known")
    return staying


def _of_one_model(members: list[Replica], before: Sequence[Replica], remarks: list[str]) -> list[Replica]:
    """Those with the pool's model: the one that was served before, else the one with the most weight."""
    digests = {r.model_digest for r in members if r.model_digest}
    if len(digests) < 2:
        return members
    served = [r.model_digest for r in before if r.model_digest in digests]
    weights = {d: sum(r.weight for r in members if r.model_digest == d) for d in sorted(digests)}
    pool = max(set(served), key=served.count) if served else max(weights, key=weights.__getitem__)
    for r in members:
        if r.model_digest not in ("", pool):
            remarks.append(
                f"{r.name} at {r.authority} serves another model ({r.model_digest[:12]}) than the pool ({pool[:12]}): "
                "left out; give it a pool of its own (--service)"
            )
    return [r for r in members if r.model_digest in ("", pool)]
