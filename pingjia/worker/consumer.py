"""The asyncio end of one request: where the engine's thread leaves chunks, and whether anybody still wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from pingjia.types import Chunk, Request

Item = Chunk | Exception


class Consumer:
    """Created in the event loop that reads `queue`. `is_gone` is set there and only read by the engine's thread."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.is_gone = False
        self.has_begun = False  # its first chunk is out; known to the engine's thread alone


def deliver(items: Iterable[tuple[Consumer, Item]]) -> list[Consumer]:
    """Hand items over to their event loops, waking each loop once; return the consumers whose loop is closed."""
    lost: list[Consumer] = []
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Consumer, Item]]] = {}
    for consumer, item in items:
        by_loop.setdefault(consumer.loop, []).append((consumer, item))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:  # the loop is closed
            lost += [consumer for consumer, _ in own]
    return lost


def _put(items: list[tuple[Consumer, Item]]) -> None:
    for consumer, item in items:
        consumer.queue.put_nowait(item)
