"""A worker process whose backend needs no model: `python scripted_worker.py URL PREFIX SEATS TOKEN_S LEASE_S LOG`.

Its answer is a function of the request, as an engine's is with a seed. Every token it makes is a line in LOG, so that a
test sees what was computed for nobody.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from pingjia.queue.opening import open_queue
from pingjia.queue.policy import Limits
from pingjia.types import Chunk, EngineStats, ModelCard, Request, Usage
from pingjia.worker.pulling import pull

FIRST_BYTE = 3


def answer_ids(request: Request) -> list[int]:
    """What every worker answers to it."""
    num = min(request.sampling.max_tokens, 500)
    return [FIRST_BYTE + ord("a") + (sum(request.prompt_ids) + 7 * i) % 26 for i in range(num)]


class ScriptedBackend:
    def __init__(self, token_s: float, log: str) -> None:
        self.token_s = token_s
        self.running = 0
        self.log = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  as long as the process

    def models(self) -> list[ModelCard]:
        return [ModelCard("base", "/m", None, 4096, 1), ModelCard("shop", "/a", "base", 4096, 1)]

    def stats(self) -> EngineStats:
        return EngineStats(num_running=self.running)

    def is_ready(self) -> bool:
        return True

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        self.running += 1
        try:
            for token in (ids := answer_ids(request)):
                await asyncio.sleep(self.token_s)
                self.log.write(f"{os.getpid()} {request.id}\n")
                yield Chunk(chr(token - FIRST_BYTE), (token,))
            yield Chunk("", finish_reason="length", usage=Usage(len(request.prompt_ids), len(ids)))
        finally:
            self.running -= 1


if __name__ == "__main__":
    url, prefix, seats, token_s, lease_s, log = sys.argv[1:]
    limits = Limits(lease_s=float(lease_s), max_requests=100_000, max_units=10**9, max_deliveries=10)
    pull(
        ScriptedBackend(float(token_s), log),
        lambda: open_queue(url, limits, prefix=prefix),
        seats=int(seats),
        lease_s=limits.lease_s,
        drain_s=5.0,
        on_ready=lambda name: print(name, flush=True),
    )
