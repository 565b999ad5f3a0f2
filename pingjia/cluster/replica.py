"""One replica as Consul shows it, and how a replica writes itself down there. Plain data; nothing is asked here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pingjia.types import ModelCard

MAX_META_CHARS = 512  # of one value, by Consul
_MAX_ADAPTERS = 40  # of Consul's 64 entries
_PER_TOKEN_S = 10  # weights are tenths of a token a second: a slow machine has 5 tokens a second, not one of 5 steps
_MAX_WEIGHT = 65_535


class State(StrEnum):
    """PASSING gets requests. DRAINING was told to leave, FAILED was not heard of or cannot answer."""

    PASSING = "passing"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as it lies on the replica's disk."""

    name: str
    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class Replica:
    """A member of a pool. `weight` is what it gets of the requests, in tenths of a token a second.

    instance: drawn anew by every process. model_digest: of the base's weights. obeyed: id of the last order it took,
    with `complaint` if it could not obey.
    """

    name: str
    address: str
    port: int
    weight: int
    state: State = State.PASSING
    instance: str = ""
    scheme: str = "http"
    model: str = ""
    model_digest: str = ""
    version: str = ""
    tokens_per_s: float = 0.0
    seats: int = 0
    adapters: tuple[ServedAdapter, ...] = ()
    obeyed: str = ""
    complaint: str = ""
    said: str = ""

    @property
    def authority(self) -> str:
        """host:port, as in a URL."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}"


def weight_of(tokens_per_s: float) -> int:
    """The weight of a measured rate; at least 1, because only draining takes a replica out."""
    return min(_MAX_WEIGHT, max(1, round(tokens_per_s * _PER_TOKEN_S)))


def meta_of(
    cards: Sequence[ModelCard], *, version: str, tokens_per_s: float, seats: int, more: Mapping[str, str]
) -> dict[str, str]:
    """What Consul keeps with the service. Values longer than it takes are cut, digests never."""
    base, *adapters = cards
    meta = {
        "model": base.id,
        "model_digest": base.digest,
        "version": version,
        "tokens_per_s": f"{tokens_per_s:.1f}",
        "seats": str(seats),
        "num_adapters": str(len(adapters)),
        **more,
    }
    for i, card in enumerate(adapters[:_MAX_ADAPTERS]):
        meta[f"adapter_{i}"] = _adapter_value(card)
    return {key: value[:MAX_META_CHARS] for key, value in meta.items()}


def _adapter_value(card: ModelCard) -> str:
    value = json.dumps([card.id, card.digest, card.root], ensure_ascii=False)
    return value if len(value) <= MAX_META_CHARS else json.dumps([card.id[:100], card.digest, ""], ensure_ascii=False)


def read_replicas(entries: Sequence[Mapping[str, Any]]) -> list[Replica]:
    """Consul's health entries -> replicas, by name. Entries that nothing of ours has written are taken as they are."""
    return sorted((_replica(entry) for entry in entries), key=lambda r: (r.name, r.authority))


def _replica(entry: Mapping[str, Any]) -> Replica:
    service, meta = entry["Service"], entry["Service"].get("Meta") or {}
    return Replica(
        name=meta.get("name") or service["ID"],
        address=service.get("Address") or entry["Node"]["Address"],
        port=service["Port"],
        weight=int((service.get("Weights") or {}).get("Passing", 1)),
        state=_state(entry, meta),
        instance=meta.get("instance", ""),
        scheme=meta.get("scheme", "http"),
        model=meta.get("model", ""),
        model_digest=meta.get("model_digest", ""),
        version=meta.get("version", ""),
        tokens_per_s=_number(meta.get("tokens_per_s", "")),
        seats=int(_number(meta.get("seats", ""))),
        adapters=tuple(_adapters(meta)),
        obeyed=meta.get("obeyed", ""),
        complaint=meta.get("complaint", ""),
        said=_said(entry, meta),
    )


def _said(entry: Mapping[str, Any], meta: Mapping[str, str]) -> str:
    words = " ".join(check.get("Output", "") for check in entry["Checks"] if check["Status"] != "passing").strip()
    return words or meta.get("said", "")


def _state(entry: Mapping[str, Any], meta: Mapping[str, str]) -> State:
    if meta.get("state") == State.DRAINING:
        return State.DRAINING
    # A warning still answers; what is not there at all says "critical".
    return State.FAILED if any(check["Status"] == "critical" for check in entry["Checks"]) else State.PASSING


def _adapters(meta: Mapping[str, str]) -> list[ServedAdapter]:
    found = []
    for i in range(_MAX_ADAPTERS):
        try:
            found.append(ServedAdapter(*json.loads(meta[f"adapter_{i}"])))
        except (KeyError, ValueError, TypeError):
            break
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
