"""What a stub replica is told, without importing what it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StubSettings:
    """What a stub replica is told. tokens_per_s: of all its answers together; seats: answers at once."""

    port: int
    tokens_per_s: float = 200.0
    seats: int = 8
    name: str = ""
    service: str = "pingjia"
    consul: str = ""
    host: str = "127.0.0.1"
    digest: str = "d" * 64
    ttl_s: float = 3.0
    beat_s: float = 0.75
    leave_s: float = 3.0
    drain_s: float = 30.0
    weight: int | None = None
    version: str = "1"
    fails: bool = False  # never ready: what a bad version does
    max_concurrent: int = 512
    token: str = ""
    key: str = ""  # clients must have; needed beyond the loopback

    def argument(self) -> str:
        return json.dumps(asdict(self))
