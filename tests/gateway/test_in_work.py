"""Answers at once, counted by one gateway or by several over Redis; a dead gateway's places come back."""

from __future__ import annotations

import asyncio
import signal

import pytest

from pingjia.gateway.in_work import Places


async def test_no_more_than_the_limit():
    places = Places(None, 60)
    taken = [await places.enter("a", 2, 5) for _ in range(3)]
    assert [isinstance(t, list) for t in taken] == [True, True, False]
    assert taken[2] == 4
    assert isinstance(await places.enter("b", 5, 5), list)
    await places.leave("a", taken[0])
    assert isinstance(await places.enter("a", 3, 5), list)
    assert places.here("a") == 5


async def test_gateways_share_it_over_redis(redis):
    one, two = Places(redis.url, 60), Places(redis.url, 60)
    results = await asyncio.gather(*(p.enter("a", 1, 7) for p in (one, two) for _ in range(10)))
    taken = [(p, r) for p, r in zip([one] * 10 + [two] * 10, results, strict=True) if isinstance(r, list)]
    assert len(taken) == 7
    assert await two.enter("a", 1, 7) in (7, 6, 5)  # of all gateways, or of this one where it is full by itself
    owner, held = taken[0]
    await owner.leave("a", held)
    assert isinstance(await two.enter("a", 1, 7), list)
    assert one.here("a") + two.here("a") == 7
    await one.close()
    await two.close()


async def test_places_of_a_dead_gateway_come_back(redis):
    dead, alive = Places(redis.url, 0.2), Places(redis.url, 60)
    await dead.enter("a", 3, 3)
    await dead.close()
    assert await alive.enter("a", 1, 3) == 3
    await asyncio.sleep(0.3)
    assert isinstance(await alive.enter("a", 3, 3), list)
    await alive.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_without_redis_each_counts_its_own_and_it_comes_back(redis, how):
    now = [0.0]
    places = Places(redis.url, 60, lambda: now[0])
    first = await places.enter("a", 1, 3)
    if how == "killed":
        redis.stop()
    else:
        redis.signal(signal.SIGSTOP)
    assert isinstance(await places.enter("a", 2, 3), list)
    assert await places.enter("a", 1, 3) == 3
    await places.leave("a", first)
    assert places.here("a") == 2
    if how == "killed":
        redis.start()
    else:
        redis.signal(signal.SIGCONT)
    now[0] += 3
    assert isinstance(await places.enter("a", 1, 3), list)  # what was given back meanwhile is free
    assert places.here("a") == 3
    other = Places(redis.url, 60)
    assert isinstance(await other.enter("a", 1, 9), list)
    await places.close()
    await other.close()


async def test_a_client_that_leaves_while_it_is_let_in_holds_no_place(redis):
    places = Places(redis.url, 60)
    await places.enter("b", 1, 1)  # connected
    redis.signal(signal.SIGSTOP)
    task = asyncio.create_task(places.enter("a", 1, 1))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    redis.signal(signal.SIGCONT)
    assert places.here("a") == 0
    assert isinstance(await places.enter("a", 1, 1), list)
    await places.close()
