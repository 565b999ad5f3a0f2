"""What a key may do, held against every request: models, budget, answers at once, requests and tokens a minute.

Tokens are counted as the prompt plus the longest answer when a request is taken on, and corrected when it ends. Not
here: how counting over Redis works (`rate_limits.py`), nor who has which limits (`keys.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil, inf

from pingjia.errors import ModelNotFound
from pingjia.gateway.errors import QuotaExceeded, RateLimited
from pingjia.gateway.in_work import Places
from pingjia.gateway.keys import Key
from pingjia.gateway.rate_limits import WINDOW_S, RateLimits, Taken
from pingjia.types import Request

Spent = Callable[[str], float]
"""Id of a key -> yuan it has spent this month."""

_SMOOTHING = 0.1


@dataclass(slots=True)
class Visit:
    """One request of a key. `num_used`: tokens it really took, set before it ends; none for a cached answer."""

    key: Key
    headers: MutableMapping[str, str]
    num_reserved: int = 0
    num_used: int = 0
    reserved_at: float = field(default=0.0)


class Guard:
    """Holds keys to their limits. One per app; lives on the event loop."""

    def __init__(self, rates: RateLimits, places: Places, spent: Spent | None, clock: Callable[[], float]) -> None:
        self._rates = rates
        self._places = places
        self._spent = spent
        self._clock = clock
        self._mean_s = 1.0

    @property
    def is_lost(self) -> bool:
        """Whether limits are kept by this process alone because Redis cannot be reached."""
        return self._rates.is_lost

    @asynccontextmanager
    async def visit(
        self, key: Key, model: str, num_answers: int, headers: MutableMapping[str, str]
    ) -> AsyncIterator[Visit]:
        """Let a request in. `headers` get the x-ratelimit fields, also when it is refused.

        Raises ModelNotFound, QuotaExceeded or RateLimited.
        """
        check_model(key, model)
        self._check_budget(key)
        places = await self._enter(key, num_answers)
        visit, started = Visit(key, headers), self._clock()
        try:
            await self._take_request(visit)
            yield visit
        finally:
            # Also when the client has left: cancelled here, the places would stay taken.
            await asyncio.shield(self._end(visit, places, self._clock() - started))

    async def reserve(self, visit: Visit, requests: Sequence[Request]) -> None:
        """Count the tokens that a request may take. Raises RateLimited."""
        limit = visit.key.tokens_per_minute
        if limit is None:
            return
        cost = num_tokens(requests)
        taken = await self._rates.take(f"tokens:{visit.key.id}", limit, cost)
        _describe(visit.headers, "tokens", limit, taken)
        if not taken.ok:
            raise _too_many_tokens(taken, limit)
        visit.num_reserved, visit.reserved_at = cost, self._clock()

    async def close(self) -> None:
        await self._rates.close()
        await self._places.close()

    async def _take_request(self, visit: Visit) -> None:
        limit = visit.key.requests_per_minute
        if limit is None:
            return
        taken = await self._rates.take(f"requests:{visit.key.id}", limit, 1)
        _describe(visit.headers, "requests", limit, taken)
        if not taken.ok:
            raise RateLimited(
                f"this key may ask {taken.limit} times a minute and has; come back in {ceil(taken.wait_s)} s",
                kind="requests",
                retry_after_s=taken.wait_s,
            )

    async def _end(self, visit: Visit, places: list[str], seconds: float) -> None:
        await self._leave(visit.key, places, seconds)
        await self._correct(visit)

    async def _correct(self, visit: Visit) -> None:
        unused = visit.num_reserved - visit.num_used
        # What was reserved longer ago than a minute is forgotten already; given back now it would be given twice.
        if unused > 0 and self._clock() - visit.reserved_at < WINDOW_S:
            await self._rates.give_back(f"tokens:{visit.key.id}", unused)

    def _check_budget(self, key: Key) -> None:
        budget = key.monthly_budget_cny
        if budget is None:
            return
        if self._spent is None:
            raise QuotaExceeded("this key has a monthly budget, and this server keeps no ledger to count it by")
        spent = self._spent(key.id)
        if spent >= budget:
            raise QuotaExceeded(
                f"this key has spent {spent:.4f} of the {budget:g} yuan it may spend this month; a new month begins on "
                "the first at 00:00 UTC"
            )

    async def _enter(self, key: Key, num: int) -> list[str]:
        limit = key.max_concurrent
        if limit is None:
            return []
        if num > limit:
            raise RateLimited(f"{num} answers at once; this key may have {limit} in work", kind="concurrency")
        places = await self._places.enter(key.id, num, limit)
        if isinstance(places, int):
            raise RateLimited(
                f"this key has {places} answers in work and may have {limit}; wait for one to end",
                kind="concurrency",
                retry_after_s=self._mean_s,
            )
        return places

    async def _leave(self, key: Key, places: list[str], seconds: float) -> None:
        self._mean_s += _SMOOTHING * (seconds - self._mean_s)
        if places:
            await self._places.leave(key.id, places)


def check_model(key: Key, model: str) -> None:
    """Raises ModelNotFound for a model that the key may not use."""
    if not key.may_use(model):
        raise ModelNotFound(f"model {model[:200]!r} is not open to this key; it may use {', '.join(key.models)}")


def num_tokens(requests: Sequence[Request]) -> int:
    """Prompts, each counted once, plus the longest possible answers."""
    prompts = {(request.prompt_ids, request.passed): request.num_prompt for request in requests}
    return sum(prompts.values()) + sum(request.sampling.max_tokens * request.sampling.n for request in requests)


def _too_many_tokens(taken: Taken, limit: int) -> RateLimited:
    if taken.cost > limit:
        return RateLimited(
            f"prompt and longest answer have {taken.cost} tokens together, and this key may use {limit} a minute; "
            "shorten the prompt or give a smaller max_tokens",
            kind="tokens",
        )
    wait_s = taken.wait_s if taken.wait_s < inf else float(WINDOW_S)
    return RateLimited(
        f"prompt and longest answer have {taken.cost} tokens together, and {taken.remaining} of this key's "
        f"{taken.limit} a minute are left; come back in {ceil(wait_s)} s",
        kind="tokens",
        retry_after_s=wait_s,
    )


def _describe(headers: MutableMapping[str, str], what: str, limit: int, taken: Taken) -> None:
    """OpenAI's headers. The limit is the key's own, what remains is what this server grants now."""
    headers[f"x-ratelimit-limit-{what}"] = str(limit)
    headers[f"x-ratelimit-remaining-{what}"] = str(taken.remaining)
    headers[f"x-ratelimit-reset-{what}"] = duration(taken.window.empty_in_s)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 250ms, 1.5s, 6m0s."""
    if 0 < seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    minutes, rest = divmod(round(seconds, 2), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
