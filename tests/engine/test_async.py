"""The engine in event loops: the same answers, one thread that computes, and nothing computed for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from pingjia.engine import Engine
from pingjia.engine.driver import Driver, _Listener
from pingjia.errors import EngineError, RequestError
from pingjia.types import Chunk, Completion, Grammar, Message, Request, Sampling

MakeEngine = Callable[..., Engine]
PROMPTS = ["abc", "x" * 50, "another", "abc"]
SAMPLING = Sampling(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)


def drivers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "pingjia-driver"]


async def gone(engine: Engine) -> None:
    """Wait until nobody computes any more."""
    for _ in range(500):
        if not engine.has_work() and not drivers():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{engine.stats().num_running} requests still run, {len(drivers())} drivers are alive")


def spy_steps(engine: Engine, before: Callable[[int], None] = lambda step: None) -> list[str]:
    """The names of the threads that ran the network, step by step."""
    run, names = engine._runner.run, list[str]()

    def watched(plan: list[Any]) -> Any:
        names.append(threading.current_thread().name)
        before(len(names))
        return run(plan)

    engine._runner.run = watched  # type: ignore[method-assign]
    return names


async def test_answers_equal_those_of_generate(tiny_engine: MakeEngine) -> None:
    wanted = tiny_engine().generate(PROMPTS, SAMPLING)
    engine, ended = tiny_engine(), list[tuple[int, Completion]]()
    answers = await engine.agenerate(PROMPTS, SAMPLING, on_done=lambda i, c: ended.append((i, c)))
    assert [a.token_ids for a in answers] == [a.token_ids for a in wanted]
    assert sorted(ended, key=lambda pair: pair[0]) == list(enumerate(answers))
    chunks = [chunk async for chunk in engine.astream("abc", SAMPLING)]
    assert "".join(c.text for c in chunks) == wanted[0].text
    assert [bool(c.finish_reason) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert await engine.agenerate([], SAMPLING) == []
    await gone(engine)


async def test_many_tasks_share_a_batch_and_one_thread(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    names = spy_steps(engine, before=lambda step: time.sleep(0.01))
    answers = await asyncio.gather(*(engine.agenerate(f"prompt {i}", SAMPLING) for i in range(8)))
    assert all(len(answer.token_ids) == 20 for (answer,) in answers)
    assert set(names) == {"pingjia-driver"}
    assert len(names) < 4 * 20, "they were not computed together"
    await gone(engine)


def test_several_event_loops_and_plain_threads_at_once(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    wanted = [a.token_ids for a in engine.generate(PROMPTS, SAMPLING)]
    got: list[list[tuple[int, ...]]] = []

    def in_a_loop() -> None:
        answers = asyncio.run(engine.agenerate(PROMPTS, SAMPLING))
        got.append([a.token_ids for a in answers])

    def plain() -> None:
        got.append([a.token_ids for a in engine.generate(PROMPTS, SAMPLING)])

    threads = [threading.Thread(target=target) for target in (in_a_loop, in_a_loop, plain, in_a_loop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [wanted] * 4
    asyncio.run(gone(engine))


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_whoever_goes_away_is_computed_for_no_more(tiny_engine: MakeEngine, how: str) -> None:
    engine, long = tiny_engine(), replace(SAMPLING, max_tokens=400)
    names = spy_steps(engine, before=lambda step: time.sleep(0.02))
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(engine.astream("abc", long)) as chunks:
            async for _ in chunks:
                started.set()
                if how == "close":
                    return

    task = asyncio.create_task(read())
    await started.wait()
    if how == "cancel":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    num_steps = len(names)
    await gone(engine)
    assert len(names) - num_steps <= 2, "the step in progress, and none that began after it"
    assert engine.stats().kv_tokens_used == 0


async def test_one_that_leaves_does_not_disturb_the_others(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    (wanted,) = tiny_engine().generate("abc", SAMPLING)
    doomed = [asyncio.create_task(engine.agenerate(f"doomed {i}", replace(SAMPLING, max_tokens=300))) for i in range(3)]
    staying = asyncio.create_task(engine.agenerate("abc", SAMPLING))
    await asyncio.sleep(0.02)
    for task in doomed:
        task.cancel()
    (answer,) = await staying
    assert answer.token_ids == wanted.token_ids
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*doomed, return_exceptions=True))
    await gone(engine)


async def test_refusals_and_failures_reach_who_asked(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(max_model_len=64)
    with pytest.raises(RequestError, match="together"):
        await engine.agenerate(["ok", "x" * 50], Sampling(max_tokens=30))
    with pytest.raises(RequestError, match="unclosed"):
        await engine.agenerate("ok", Sampling(grammar=Grammar.regex("((")))
    assert not engine.has_work()

    def fail(step: int) -> None:
        raise ValueError("out of luck")

    spy_steps(engine, before=fail)
    with pytest.raises(EngineError, match="out of luck"):
        await engine.agenerate("ok", Sampling(max_tokens=3))
    chunks = [chunk async for chunk in engine.astream("ok", Sampling(max_tokens=3))]
    assert [chunk.finish_reason for chunk in chunks] == ["error"]
    await gone(engine)


async def test_a_driver_that_dies_says_so_and_the_next_one_works(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    with monkeypatch.context() as patch:
        patch.setattr(Driver, "_see_off", lambda self, present: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await engine.agenerate("abc", SAMPLING)
    assert len((await engine.agenerate("abc", SAMPLING))[0].token_ids) == 20
    await gone(engine)


def test_a_closed_loop_does_not_keep_the_driver(tiny_engine: MakeEngine) -> None:
    """A caller whose loop has ended without closing its iterator."""
    engine = tiny_engine()

    async def listen() -> _Listener:
        return _Listener([Request("a", (1, 70), replace(SAMPLING, max_tokens=400))])

    engine._driver._welcome(asyncio.run(listen()))
    asyncio.run(gone(engine))
    assert engine.stats().num_steps < 5


async def test_a_stream_of_several_answers(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    held = Sampling(max_tokens=40, temperature=1.0, seed=1, n=3, grammar=Grammar.regex("[a-f]{4,9}"))
    chunks: list[Chunk] = [chunk async for chunk in engine.astream([Message("user", "abc")], held)]
    texts = ["".join(c.text for c in chunks if c.index == k) for k in range(3)]
    assert texts == [a.text for a in engine.generate([Message("user", "abc")], held)]
    assert sum(c.finish_reason is not None for c in chunks) == 3
    await gone(engine)
