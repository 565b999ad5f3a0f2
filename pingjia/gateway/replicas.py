"""Which of several servers gets the next request. Pure: no sockets, no clock; who is alive is decided before.

Not here: asking them (`upstream_server.py`) and trying another one after a failure (`upstream.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pingjia.types import Request


@dataclass(frozen=True, slots=True)
class Replica:
    """A server as a policy sees it. weight: its speed beside that of the others, above 0.

    num_outstanding: answers it works on for this gateway. num_begun: all that it was given so far.
    """

    name: str
    weight: float = 1.0
    num_outstanding: int = 0
    num_begun: int = 0


class Policy(Protocol):
    """How a replica is chosen. One object per gateway; called on the event loop, so it must not wait."""

    def choose(self, replicas: Sequence[Replica], request: Request) -> Replica:
        """One of `replicas`, which can all take the request now; there is at least one."""
        ...


class LeastOutstanding:
    """The replica with the fewest answers in work for its weight; among equals, the one that was given the fewest."""

    def choose(self, replicas: Sequence[Replica], request: Request) -> Replica:
        return min(replicas, key=lambda r: ((r.num_outstanding + 1) / r.weight, (r.num_begun + 1) / r.weight))
