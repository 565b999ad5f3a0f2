"""What every queue promises, held against both: in one process and over a real Redis."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from pingjia.errors import EngineError, Overloaded, RequestError
from pingjia.queue.job import End
from pingjia.queue.policy import ShareExceeded
from pingjia.queue.protocol import WorkerCard
from pingjia.types import Chunk, EngineStats, ModelCard, TokenLogprob, Usage

DONE = End("done")
CHUNKS = (
    Chunk("你", (4, 5), (TokenLogprob(4, -0.5, ((4, -0.5), (9, float("-inf")))), TokenLogprob(5, -0.25))),
    Chunk("", (), finish_reason="stop", usage=Usage(3, 2, 1)),
)


def card(name="w", seats=4, **fields):
    return WorkerCard(name, seats, models=(ModelCard("base", "/m"),), **fields)


async def ids_of(queue, num=100):
    return [claim.job.id for claim in await queue.claim("w", num, 0.0)]


async def read(queue, job_id):
    return [part async for part in queue.follow(job_id)]


async def test_an_answer_comes_back_whole_and_in_order(make, job):
    queue = make()
    await queue.submit([job("a")])
    (claim,) = await queue.claim("w", 1, 0.0)
    assert (claim.job, claim.delivery) == (job("a"), 1)
    assert 590 < claim.left_s <= 600
    reading = asyncio.create_task(read(queue, "a"))
    for seq in (1, 2, 3):
        assert await queue.publish(claim, seq, (Chunk(str(seq), (seq,)),))
    assert (await queue.status("a")).state == "claimed"
    assert await queue.end(claim, 4, CHUNKS, DONE, 5)
    parts = await asyncio.wait_for(reading, 5)
    assert [c.text for part in parts for c in part.chunks] == ["1", "2", "3", "你", ""]
    assert [c for part in parts for c in part.chunks][3:] == list(CHUNKS)
    assert [part.end for part in parts] == [None, None, None, DONE]
    assert await read(queue, "a") == parts, "whoever comes later reads the same"
    status = await queue.status("a")
    assert (status.state, status.end, status.tenant) == ("ended", DONE, "")


async def test_a_reader_gets_pieces_while_they_are_made(make, job):
    queue = make()
    await queue.submit([job("a")])
    (claim,) = await queue.claim("w", 1, 0.0)
    async with aclosing(queue.follow("a")) as parts:
        for seq in (1, 2, 3):
            await queue.publish(claim, seq, (Chunk(str(seq), (seq,)),))
            part = await asyncio.wait_for(anext(parts), 5)
            assert (part.delivery, part.seq, part.chunks[0].text) == (1, seq, str(seq))


async def test_submitting_twice_is_submitting_once(make, job):
    queue = make()
    await queue.submit([job("a"), job("b")])
    await queue.submit([job("b"), job("c")])
    assert (await queue.stats()).num_waiting == 3
    assert await ids_of(queue) == ["a", "b", "c"]
    await queue.submit([job("a")])
    assert await ids_of(queue) == []


async def test_publishing_and_ending_twice_change_nothing(make, job):
    queue = make()
    await queue.submit([job("a")])
    (claim,) = await queue.claim("w", 1, 0.0)
    for _ in range(2):
        assert await queue.publish(claim, 1, (Chunk("x", (1,)),))
    assert await queue.end(claim, 2, CHUNKS, DONE, 5)
    assert not await queue.end(claim, 2, CHUNKS, DONE, 5)
    assert not await queue.publish(claim, 3, (Chunk("late", (1,)),))
    assert [(p.delivery, p.seq) for p in await read(queue, "a")] == [(1, 1), (1, 2)]
    assert (await queue.stats()).ended == {"done": 1}


async def test_claims_are_what_was_asked_for_and_never_twice(make, job):
    queue = make()
    await queue.submit([job(f"j{i}") for i in range(10)])
    claims = await asyncio.gather(*(queue.claim(f"w{i}", 3, 0.0) for i in range(5)))
    got = [claim.job.id for some in claims for claim in some]
    assert sorted(got) == [f"j{i}" for i in range(10)]
    assert all(len(some) <= 3 for some in claims)
    stats = await queue.stats()
    assert (stats.num_waiting, stats.units_waiting, stats.num_claimed) == (0, 0, 10)


async def test_a_worker_that_waits_is_woken(make, job):
    queue = make()
    waiting = asyncio.create_task(queue.claim("w", 1, 8.0))
    await asyncio.sleep(0.1)
    await queue.submit([job("a")])
    assert [c.job.id for c in await asyncio.wait_for(waiting, 3)] == ["a"]


async def test_a_dead_workers_job_is_claimed_again_and_the_dead_has_no_say(make, job, clock):
    queue = make(lease_s=0.3)
    await queue.submit([job("a")])
    (first,) = await queue.claim("dead", 1, 0.0)
    await queue.publish(first, 1, (Chunk("x", (1,)),))
    assert await ids_of(queue) == []
    await clock.pass_s(0.35)
    (second,) = await queue.claim("w", 5, 0.0)
    assert (second.job.id, second.delivery) == ("a", 2)
    assert not await queue.publish(first, 2, (Chunk("zombie", (2,)),))
    assert not await queue.end(first, 3, (), DONE, 1)
    assert await queue.beat(card("dead"), [first]) == {"a"}
    assert await queue.end(second, 1, CHUNKS, DONE, 5)
    parts = await read(queue, "a")
    assert [(p.delivery, p.seq) for p in parts] == [(1, 1), (2, 1)]
    assert (await queue.stats()).num_redelivered == 1


async def test_who_beats_keeps_its_claims(make, job, clock):
    queue = make(lease_s=0.4)
    await queue.submit([job("a")])
    (claim,) = await queue.claim("alive", 1, 0.0)
    for _ in range(4):
        await clock.pass_s(0.2)
        assert await queue.beat(card("alive"), [claim]) == set()
        assert await ids_of(queue) == []
    assert await queue.end(claim, 1, CHUNKS, DONE, 5)


async def test_after_so_many_dead_workers_it_fails_with_the_reason(make, job, clock):
    queue = make(lease_s=0.15, max_deliveries=3)
    await queue.submit([job("a")])
    for delivery in (1, 2, 3):
        (claim,) = await queue.claim(f"w{delivery}", 1, 0.0)
        assert claim.delivery == delivery
        await clock.pass_s(0.2)
    assert await ids_of(queue) == []
    (part,) = await read(queue, "a")
    assert part.end.kind == "failed"
    assert "3 workers" in part.end.message
    assert isinstance(part.end.exception(), EngineError)
    assert (await queue.status("a")).deaths == 3


async def test_what_is_given_back_is_first_again_and_no_death(make, job):
    queue = make()
    await queue.submit([job("a"), job("b"), job("c")])
    first, _ = await queue.claim("w", 2, 0.0)
    await queue.give_back(first)
    await queue.give_back(first)
    assert not await queue.publish(first, 1, (Chunk("x", (1,)),))
    again, last = await queue.claim("w2", 5, 0.0)
    assert (again.job.id, again.delivery, last.job.id) == ("a", 2, "c")
    assert (await queue.status("a")).deaths == 0


async def test_cancelling(make, job):
    queue = make()
    await queue.submit([job("waits"), job("runs")])
    assert await queue.cancel("waits", "not wanted")
    assert not await queue.cancel("waits", "not wanted")
    assert not await queue.cancel("unknown", "not wanted")
    (claim,) = await queue.claim("w", 5, 0.0)
    assert claim.job.id == "runs"
    await queue.publish(claim, 1, (Chunk("x", (1,)),))
    assert await queue.cancel("runs", "not wanted")
    assert not await queue.publish(claim, 2, (Chunk("y", (1,)),)), "so the worker learns of it with its next token"
    assert await queue.beat(card(), [claim]) == {"runs"}
    for name, num in (("waits", 1), ("runs", 2)):
        parts = await read(queue, name)
        assert (len(parts), parts[-1].end) == (num, End("cancelled", "not wanted"))
    stats = await queue.stats()
    assert (stats.num_waiting, stats.num_claimed, stats.ended) == (0, 0, {"cancelled": 2})


async def test_a_job_whose_time_is_over_is_not_begun(make, job, clock):
    queue = make()
    await queue.submit([job("late", deadline_s=0.1)])
    await queue.submit([job("good")])
    await clock.pass_s(0.15)
    assert await ids_of(queue) == ["good"]
    assert (await read(queue, "late"))[-1].end.kind == "expired"


async def test_a_job_whose_gateway_is_gone_is_not_begun(make, job, clock):
    queue = make(lease_s=0.3)
    await queue.alive("here")
    await queue.alive("gone")
    await queue.submit([job("a", owner="gone")])
    await queue.submit([job("b", owner="here")])
    await queue.submit([job("c")])
    await clock.pass_s(0.2)
    await queue.alive("here")
    await clock.pass_s(0.15)
    assert await ids_of(queue) == ["b", "c"]
    assert (await read(queue, "a"))[-1].end.kind == "abandoned"


async def test_an_unknown_job_has_no_answer(make):
    queue = make()
    (part,) = await read(queue, "nothing")
    assert part.end.kind == "abandoned"
    assert await queue.status("nothing") is None


async def test_an_answer_is_forgotten_in_time(make, job, clock):
    queue = make()
    await queue.submit([job("a", keep_s=0.2)])
    (claim,) = await queue.claim("w", 1, 0.0)
    await queue.end(claim, 1, CHUNKS, DONE, 5)
    assert await queue.status("a") is not None
    await clock.pass_s(0.3)
    assert await queue.status("a") is None


async def test_bounds_hold_for_requests_and_tokens(make, job):
    queue = make(max_requests=3, max_units=1000)
    await queue.submit([job("a"), job("b")])
    with pytest.raises(Overloaded, match="2 requests with 20 tokens"):
        await queue.submit([job("c"), job("d")])
    assert (await queue.stats()).num_waiting == 2, "all or none"
    assert await ids_of(queue, 1) == ["a"]
    await queue.submit([job("c"), job("d")])
    queue = make(max_requests=100, max_units=50)
    await queue.submit([job("a", tokens=37)])
    with pytest.raises(Overloaded):
        await queue.submit([job("b", tokens=8)])
    queue = make(max_requests=100, max_units=50)
    await queue.submit([job("a", tokens=37)])
    await queue.submit([job("b", tokens=7)])


async def test_one_key_cannot_fill_the_queue(make, job):
    queue = make(max_requests=8)
    await queue.submit([job(f"a{i}", tenant="a") for i in range(6)])
    with pytest.raises(ShareExceeded):
        await queue.submit([job("a6", tenant="a")])
    await queue.submit([job("b0", tenant="b"), job("b1", tenant="b")])
    assert (await queue.stats()).num_tenants == 2


async def test_keys_take_turns_by_what_they_were_served(make, job):
    queue = make()
    await queue.submit([job(f"a{i}", tenant="a") for i in range(4)])
    await queue.submit([job(f"b{i}", tenant="b", tokens=17) for i in range(2)])
    await queue.submit([job(f"c{i}", tenant="c") for i in range(2)])
    got = [(await ids_of(queue, 1))[0] for _ in range(8)]
    assert got == ["a0", "b0", "c0", "a1", "c1", "a2", "b1", "a3"]


async def test_ranks_share_by_weight_and_the_low_one_does_not_starve(make, job):
    queue = make()
    await queue.submit([job(f"l{i}", rank="low") for i in range(10)])
    await queue.submit([job(f"n{i}") for i in range(40)])
    got = [(await ids_of(queue, 1))[0] for _ in range(27)]
    assert sum(name.startswith("n") for name in got) == 24
    await queue.submit([job("h", rank="high")])
    assert "h" in await ids_of(queue, 2)


async def test_a_deadline_that_cannot_be_met_is_refused_with_the_time(make, job):
    queue = make()
    await queue.beat(card(seats=2, units_per_s=10.0), [])
    await queue.stats()
    await queue.submit([job(f"j{i}", deadline_s=60) for i in range(10)])
    with pytest.raises(Overloaded, match="12 s at the measured pace and may take 5") as caught:
        await queue.submit([job("x", deadline_s=5)])
    assert caught.value.retry_after_s == pytest.approx(7.5, abs=0.1)
    with pytest.raises(Overloaded) as caught:
        await queue.submit([job("y", deadline_s=5)])
    assert caught.value.retry_after_s == pytest.approx(8.5, abs=0.1), "behind the one refused before"
    await queue.submit([job("z", deadline_s=30)])


async def test_workers_say_what_they_serve_until_they_are_gone(make, clock):
    queue = make(lease_s=0.3)
    cards = [card("w1", 4, units_per_s=7.5, stats=EngineStats(num_running=2)), card("w2", is_ready=False)]
    for one in cards:
        await queue.beat(one, [])
    assert list((await queue.stats()).workers) == cards
    await queue.leave("w1")
    assert [w.name for w in (await queue.stats()).workers] == ["w2"]
    await clock.pass_s(0.4)
    assert (await queue.stats()).workers == ()


async def test_failures_keep_their_kind(make, job):
    queue = make()
    await queue.submit([job("a")])
    (claim,) = await queue.claim("w", 1, 0.0)
    await queue.end(claim, 1, (), End.of(RequestError("no", param="stop", code="bad")), 0)
    error = (await read(queue, "a"))[-1].end.exception()
    assert (type(error), str(error), error.param, error.code) == (RequestError, "no", "stop", "bad")
    assert "secret" not in End.of(ValueError("secret")).message


async def test_records_belong_to_a_tenant(make, clock):
    queue = make()
    await queue.save("job", "r", "text", tenant="a", keep_s=0.3)
    assert await queue.load("job", "r", tenant="a") == "text"
    assert await queue.load("job", "r", tenant="b") is None
    assert await queue.load("batch", "r", tenant="a") is None
    assert await queue.add("job", "r", "other", tenant="a", keep_s=1) == "text"
    assert await queue.add("job", "s", "new", tenant="a", keep_s=1) is None
    await clock.pass_s(0.4)
    assert await queue.load("job", "r", tenant="a") is None


async def test_nothing_of_ended_jobs_and_dead_workers_stays_in_redis(redis_server, job):
    import uuid

    from redis.asyncio import Redis

    from pingjia.queue.policy import Limits
    from pingjia.queue.streams import StreamQueue

    prefix = f"t{uuid.uuid4().hex}:"
    queue = StreamQueue(redis_server.url, Limits(lease_s=0.2), prefix=prefix)
    for round_ in range(5):
        await queue.submit([job(f"j{round_}-{i}", keep_s=0.1, tenant=f"t{i}") for i in range(4)])
        claims = await queue.claim(f"w{round_}", 3, 0.0)
        await queue.beat(card(f"w{round_}"), claims)
        for claim in claims[:2]:  # the third dies with its worker, and is claimed by the next one
            await queue.publish(claim, 1, (Chunk("x", (1,)),))
            await queue.end(claim, 2, CHUNKS, DONE, 5)
        await asyncio.sleep(0.25)
    for claim in await queue.claim("last", 100, 0.0):
        await queue.end(claim, 1, CHUNKS, DONE, 5)
    await queue.leave("last")
    await asyncio.sleep(0.3)
    await queue.stats()
    async with Redis.from_url(redis_server.url, decode_responses=True) as redis:
        keys = {key.removeprefix(prefix) async for key in redis.scan_iter(f"{prefix}*")}
        assert {key.split(":")[0] for key in keys} <= {
            "work", "bell", "ended", "load", "units", "number", "served", "left"
        }  # fmt: skip
        assert await redis.xlen(f"{prefix}work") == 0
        assert await redis.xinfo_consumers(f"{prefix}work", "workers") == []
    await queue.close()


async def test_both_queues_hand_out_in_the_same_order(redis_server, job):
    """Random submissions, claims, endings, cancellations: the script in Redis decides what the Python decides."""
    import uuid

    from pingjia.queue.memory import MemoryQueue
    from pingjia.queue.streams import StreamQueue

    rng = random.Random(5)
    queues = [MemoryQueue(), StreamQueue(redis_server.url, prefix=f"t{uuid.uuid4().hex}:")]
    held: list[tuple] = []
    for step in range(150):
        act = rng.random()
        if act < 0.5:
            rank, tenant = rng.choice(["high", "normal", "low"]), rng.choice("abc")
            new = job(f"j{step}", tokens=rng.randint(1, 50), rank=rank, tenant=tenant)
            for queue in queues:
                await queue.submit([new])
        elif act < 0.85:
            num = rng.randint(1, 3)
            one, two = [await queue.claim("w", num, 0.0) for queue in queues]
            assert [c.job for c in one] == [c.job for c in two]
            held += zip(one, two, strict=True)
        elif held:
            pair = held.pop(rng.randrange(len(held)))
            spent = rng.randint(1, 60)
            kind = rng.choice(["end", "cancel", "give_back"])
            for queue, claim in zip(queues, pair, strict=True):
                if kind == "end":
                    assert await queue.end(claim, 1, (), DONE, spent)
                elif kind == "cancel":
                    assert await queue.cancel(claim.job.id, "")
                else:
                    await queue.give_back(claim)
    stats = [await queue.stats() for queue in queues]
    assert stats[0].num_waiting == stats[1].num_waiting
    assert stats[0].units_waiting == stats[1].units_waiting
    assert stats[0].num_claimed == stats[1].num_claimed
    assert stats[0].ended == stats[1].ended
    await queues[1].close()


async def test_signs_of_life_do_not_stand_in_line(redis_server):
    """With every connection taken by others, the gateway's sign and the worker's still arrive."""
    from pingjia.queue.streams import StreamQueue

    queue = StreamQueue(redis_server.url, prefix="life:")
    await queue.alive("g")
    waiting = [asyncio.create_task(queue._redis.blpop(["life:nothing"], timeout=5)) for _ in range(40)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(2.0):
        await queue.alive("g")
        assert await queue.beat(card("w1", 4), []) == set()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await queue.close()


def test_whose_gateway_was_lost_may_ask_again():
    assert isinstance(End("abandoned", "the gateway is gone").exception(), Overloaded)
    assert not isinstance(End("abandoned", "not known", "engine").exception(), Overloaded)
