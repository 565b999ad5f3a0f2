"""Equal questions at one time: one computation, and nobody loses a word whoever goes away."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.errors import EngineError
from pingjia.gateway.flights import Flights
from pingjia.types import Chunk

WORDS = ["the", "quick", "brown", "fox"]


class Computer:
    """Gives WORDS one at a time, whenever `step` is called."""

    def __init__(self, fail_at=None):
        self.gate = asyncio.Semaphore(0)
        self.runs = self.closed = self.landed = 0
        self.fail_at = fail_at

    async def start(self):
        self.runs += 1
        try:
            for i, word in enumerate(WORDS):
                await self.gate.acquire()
                if i == self.fail_at:
                    raise EngineError("broken")
                yield Chunk(word, (i,), finish_reason="stop" if i == len(WORDS) - 1 else None)
        finally:
            self.closed += 1

    async def land(self, flight):
        await asyncio.sleep(0)
        self.landed += 1
        assert [c.text for c in flight.answer] == WORDS

    async def step(self, num=1):
        for _ in range(num):
            self.gate.release()
            await settle()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def begin(flights, computer):
    return flights.join("k") or flights.begin("k", computer.start, computer.land)


async def read(follower):
    async with aclosing(follower.chunks()) as chunks:
        words = [chunk.text async for chunk in chunks]
    await follower.leave()
    return words


async def test_one_computation_for_all():
    flights, computer = Flights(), Computer()
    readers = [asyncio.create_task(read(begin(flights, computer))) for _ in range(5)]
    await computer.step(len(WORDS))
    assert await asyncio.gather(*readers) == [WORDS] * 5
    assert (computer.runs, computer.closed, computer.landed, len(flights)) == (1, 1, 1, 0)


async def test_who_comes_late_gets_it_from_the_beginning():
    flights, computer = Flights(), Computer()
    first = asyncio.create_task(read(begin(flights, computer)))
    await computer.step(2)
    late = asyncio.create_task(read(begin(flights, computer)))
    await computer.step(2)
    assert await asyncio.gather(first, late) == [WORDS, WORDS]
    assert computer.runs == 1


async def test_the_first_may_go():
    flights, computer = Flights(), Computer()
    first = asyncio.create_task(read(begin(flights, computer)))
    second = asyncio.create_task(read(begin(flights, computer)))
    await computer.step(2)
    first.cancel()
    await computer.step(2)
    assert await second == WORDS
    assert (computer.runs, computer.landed) == (1, 1)


async def test_ownership_passes_on():
    flights, computer = Flights(), Computer()
    one, two = begin(flights, computer), begin(flights, computer)
    assert (one.is_owner, two.is_owner) == (True, False)
    await one.leave()
    assert two.is_owner
    await two.leave()
    assert (computer.landed, len(flights)) == (0, 0)


async def test_when_the_last_goes_it_ends_at_once():
    flights, computer = Flights(), Computer()
    one, two = begin(flights, computer), begin(flights, computer)
    await computer.step()
    await one.leave()
    assert computer.closed == 0
    await two.leave()
    assert (computer.closed, computer.landed) == (1, 0)
    await settle()
    assert len(flights) == 0


async def test_a_whole_answer_is_kept_even_if_everybody_goes_while_it_is_put_away():
    flights, computer, slow, kept = Flights(), Computer(), asyncio.Event(), []

    async def land(flight):
        await slow.wait()
        kept.append(len(flight.answer))

    follower = flights.begin("k", computer.start, land)
    await computer.step(len(WORDS))
    await follower.leave()
    slow.set()
    await settle()
    assert kept == [len(WORDS)]
    assert len(flights) == 0


async def test_an_error_reaches_all():
    flights, computer = Flights(), Computer(fail_at=2)
    readers = [asyncio.create_task(read(begin(flights, computer))) for _ in range(3)]
    await computer.step(3)
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(r) for r in results] == [EngineError] * 3
    assert (computer.landed, computer.closed, len(flights)) == (0, 1, 0)


async def test_after_the_end_a_new_one_begins():
    flights, computer = Flights(), Computer()
    for _ in range(2):
        reader = asyncio.create_task(read(begin(flights, computer)))
        await computer.step(len(WORDS))
        assert await reader == WORDS
        await settle()
    assert computer.runs == 2


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just("come"), st.just("step"), st.integers(0, 5)), max_size=25))
def test_whatever_the_order_nobody_loses_a_word(events):
    """Comers, steps and goers in any order: who stays has all words, and as long as one stays one run goes on."""

    async def play():
        flights, computer, readers = Flights(), Computer(), []
        for event in events:
            if event == "come":
                readers.append(asyncio.create_task(read(begin(flights, computer))))
            elif event == "step":
                await computer.step()
            elif readers:
                readers[event % len(readers)].cancel()
            await settle()
        await computer.step(len(WORDS) * (computer.runs + 1))
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert all(r == WORDS or isinstance(r, asyncio.CancelledError) for r in results)
        assert computer.closed == computer.runs
        assert len(flights) == 0

    asyncio.run(play())


async def test_a_run_that_stops_early_is_not_kept():
    async def start():
        yield Chunk("a", (1,))

    flights, computer = Flights(), Computer()
    follower = flights.begin("k", start, computer.land)
    assert await read(follower) == ["a"]
    assert computer.landed == 0


async def test_several_choices_are_one_flight():
    async def start():
        for index in range(2):
            yield Chunk("a", (1,), finish_reason="stop", index=index)

    landed = []

    async def land(flight):
        landed.extend(flight.answer)

    flights = Flights()
    assert await read(flights.begin("k", start, land, num_choices=2)) == ["a", "a"]
    assert len(landed) == 2


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_leaving_twice_is_leaving_once(times):
    flights, computer = Flights(), Computer()
    follower = begin(flights, computer)
    for _ in range(times):
        await follower.leave()
    assert computer.runs <= 1
