"""What an operator wants of one replica, kept under a key of Consul's store: the replica reads it and obeys.

Through Consul because a replica may stand where no operator's machine can reach it, and because Consul's ACL says who
may write there. An order is for one process: it ends with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from pingjia.cluster.consul import Consul


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter to serve: where it lies on the replica's disk, and the digest it must have there ("": any)."""

    path: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """instance: the process it is for. adapters: to load or replace, by name; None: to stop serving."""

    instance: str
    drain: bool = False
    adapters: Mapping[str, WantedAdapter | None] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


_ORDER = TypeAdapter(Order)


def key_of(service: str, name: str) -> str:
    """Where the order for a replica lies."""
    return f"pingjia/{service}/orders/{name}"


def give(consul: Consul, service: str, name: str, order: Order) -> None:
    """Write an order; it replaces the one before."""
    consul.write(key_of(service, name), _ORDER.dump_json(order))


def read_order(consul: Consul, service: str, name: str, instance: str) -> Order | None:
    """The order for this process; None when there is none, or what lies there cannot be read."""
    value = consul.read(key_of(service, name))
    try:
        order = _ORDER.validate_json(value) if value else None
    except ValidationError:
        return None
    return order if order is not None and order.instance == instance else None
