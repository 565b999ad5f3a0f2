"""A short measurement of a backend at its start: how fast tokens come, with one answer and with several at once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing

from pingjia.cluster.speed import Rate
from pingjia.errors import EngineError
from pingjia.types import Backend, Request, Sampling

_MAX_AT_ONCE = 8
_MAX_TOKENS = 64


async def calibrate(backend: Backend, prompt_ids: Sequence[int], *, seats: int, max_s: float = 2.0) -> list[Rate]:
    """Rates with one answer and with as many as fit, up to eight. Each takes at most `max_s` after its first token.

    That tokens come out is the proof that the replica is ready. Raises EngineError when none does within a minute.
    """
    rates = []
    for at_once in sorted({1, min(seats, _MAX_AT_ONCE)}):
        async with asyncio.timeout(60.0 + max_s):
            rates.append(await _measure(backend, tuple(prompt_ids), at_once, max_s))
    return rates


async def _measure(backend: Backend, prompt_ids: tuple[int, ...], at_once: int, max_s: float) -> Rate:
    times = await asyncio.gather(*(_token_times(backend, prompt_ids, max_s) for _ in range(at_once)))
    first, last = min(t[0] for t in times if t), max(t[-1] for t in times if t)
    num = sum(map(len, times)) - at_once  # the first ones came with the prompt
    if num < 1 or last <= first:
        raise EngineError("the model ended its first answer at once; nothing can be measured")
    return Rate(at_once, num / (last - first))


async def _token_times(backend: Backend, prompt_ids: tuple[int, ...], max_s: float) -> list[float]:
    sampling = Sampling(max_tokens=_MAX_TOKENS, ignore_eos=True)
    times: list[float] = []
    # Closing the stream early cancels the request.
    async with aclosing(backend.stream(Request(f"calibrate-{uuid.uuid4().hex}", prompt_ids, sampling))) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            if chunk.error:
                raise EngineError(f"the first answer failed: {chunk.error}")
            times += [time.perf_counter()] * len(chunk.token_ids)
            if times and times[-1] - times[0] > max_s:
                break
    if not times:
        raise EngineError("the first answer has no token")
    return times
