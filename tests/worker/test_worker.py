"""The engine's thread and the streams that read from it: disconnects, failures, freezing, draining."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pingjia.engine import Engine
from pingjia.engine.grammar import Grammars
from pingjia.errors import EngineError, ModelError, ModelNotFound, Overloaded, PromptTooLong, RequestError
from pingjia.types import Chunk, Grammar, Request, Sampling
from pingjia.worker import Worker, WorkerSettings

Start = Callable[..., Worker]
LONG = Sampling(max_tokens=400, ignore_eos=True)
PATIENCE_S = 60.0


def ask(name: str = "r", max_tokens: int = 400, **changes: Any) -> Request:
    return Request(name, (1, *map(ord, "hello")), Sampling(max_tokens=max_tokens, ignore_eos=True), **changes)


def open_stream(worker: Worker, request: Request) -> AsyncGenerator[Chunk, None]:
    return cast(AsyncGenerator[Chunk, None], worker.stream(request))


async def read(worker: Worker, request: Request) -> list[Chunk]:
    async with asyncio.timeout(PATIENCE_S):
        return [chunk async for chunk in worker.stream(request)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


class Gate:
    """Holds the network inside a step until `open` is set."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self._run = engine._runner.run
        monkeypatch.setattr(engine._runner, "run", self.run)

    def run(self, slices: Any) -> torch.Tensor:
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        return self._run(slices)


# ---- answers


async def test_many_streams_at_once_get_what_the_engine_says(engine: Engine, start: Start) -> None:
    prompts = ["hello", "world", "a longer prompt than the others", "x"]
    wanted = [a.token_ids for a in engine.generate(prompts, Sampling(max_tokens=20, ignore_eos=True))]
    worker = start(engine)
    requests = [
        Request(str(i), tuple(engine.tokenizer.render_text(p)), Sampling(max_tokens=20, ignore_eos=True))
        for i, p in enumerate(prompts)
    ]
    answers = await asyncio.gather(*(read(worker, request) for request in requests))
    assert [tuple(t for c in chunks for t in c.token_ids) for chunks in answers] == wanted
    for chunks in answers:
        assert [c.finish_reason is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert worker.stats().generation_tokens_total == 160
    assert [card.id for card in worker.models()] == ["llama"]


async def test_refused_requests_raise_in_their_own_stream(engine: Engine, start: Start) -> None:
    worker = start(engine)
    with pytest.raises(PromptTooLong, match="together 606"):
        await read(worker, ask(max_tokens=600))
    with pytest.raises(ModelNotFound):
        await read(worker, ask(adapter="nobody", max_tokens=3))
    stream = open_stream(worker, ask())
    async with aclosing(stream):
        await anext(stream)
        with pytest.raises(RequestError, match="already running"):
            await read(worker, ask())
    assert len(await read(worker, ask("s", max_tokens=3))) == 3


async def test_a_grammar_is_compiled_outside_the_engines_thread(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, threads = start(engine), list[str]()
    compiling = Grammars._compile

    def watched(self: Grammars, grammar: Grammar) -> object:
        threads.append(threading.current_thread().name)
        return compiling(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", watched)
    held = Sampling(max_tokens=30, temperature=1.0, seed=1, logprobs=2, grammar=Grammar.regex("[a-f]{5}"))
    stream = open_stream(worker, ask())
    async with aclosing(stream):
        await anext(stream)
        bad = Grammar.regex("((", asked_as="response_format")
        with pytest.raises(RequestError, match=r"response_format: .*unclosed"):
            await read(worker, Request("bad", (1, 70), Sampling(grammar=bad)))
        chunks = await read(worker, Request("held", (1, 70), held))
        await anext(stream)  # the other goes on
    assert re.fullmatch("[a-f]{5}", "".join(chunk.text for chunk in chunks))
    assert sum(len(chunk.logprobs) for chunk in chunks) == 5
    assert len(threads) == 2
    assert "pingjia-engine" not in threads


# ---- disconnects


async def test_closing_a_stream_stops_its_request_within_one_step(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = engine._runner.run, list[set[str]]()

    def record(slices: Any) -> torch.Tensor:
        steps.append({piece.sequence.id for piece in slices})
        return run(slices)

    monkeypatch.setattr(engine._runner, "run", record)
    worker = start(engine)
    neighbour = asyncio.create_task(read(worker, ask("neighbour", max_tokens=100)))
    stream = open_stream(worker, ask())
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    num_begun = len(steps)
    assert len(await neighbour) == 100
    assert sum("r" in ids for ids in steps[num_begun:]) <= 1
    assert len(steps) >= 100
    stats = worker.stats()
    assert stats.tokens_after_disconnect_total <= 1, "one token per step at most"
    assert stats.kv_tokens_used == 0
    assert stats.generation_tokens_total < 400


async def test_what_a_step_computes_for_nobody_is_counted(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    worker = start(engine)
    waiting = asyncio.create_task(read(worker, ask()))
    await until(gate.entered.is_set)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open.set()
    await until(lambda: engine.stats().num_running == 0)
    assert worker.stats().tokens_after_disconnect_total == 6, "the prompt of the step in progress"
    assert engine.stats().num_steps == 1


async def test_a_request_whose_stream_closes_before_it_joins_is_never_computed(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    worker = start(engine)
    first = asyncio.create_task(read(worker, ask("first", max_tokens=2)))
    await until(gate.entered.is_set)
    second = asyncio.create_task(read(worker, ask("second")))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.open.set()
    assert len(await first) == 2
    assert worker.stats().prompt_tokens_total == 6
    assert worker.stats().tokens_after_disconnect_total == 0
    assert len(await read(worker, ask("second", max_tokens=1))) == 1, "its name is free again"


def test_a_reader_whose_event_loop_is_gone_is_cancelled(engine: Engine, start: Start) -> None:
    worker, loop = start(engine), asyncio.new_event_loop()
    stream = open_stream(worker, ask(max_tokens=500))
    loop.run_until_complete(anext(stream))
    loop.close()
    deadline = time.monotonic() + PATIENCE_S
    while engine.has_work() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not engine.has_work()
    assert worker.stats().generation_tokens_total < 500
    assert len(asyncio.run(read(worker, ask("next", max_tokens=2)))) == 2


# ---- failures


async def test_a_failing_step_ends_its_requests_and_the_worker_serves_on(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, run = start(engine), engine._runner.run

    def fail_once(slices: Any) -> torch.Tensor:
        monkeypatch.setattr(engine._runner, "run", run)
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._runner, "run", fail_once)
    (last,) = await read(worker, ask())
    assert (last.finish_reason, "device lost" in (last.error or "")) == ("error", True)
    assert worker.is_ready()
    assert len(await read(worker, ask("next", max_tokens=4))) == 4


async def test_the_death_of_the_thread_ends_every_request_and_refuses_the_next(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(engine)
    readers = [asyncio.create_task(read(worker, ask(str(i)))) for i in range(3)]
    await until(lambda: engine.stats().num_running == 3)

    def die() -> Any:
        raise SystemExit("scheduler bug")

    monkeypatch.setattr(engine._scheduler, "plan", die)
    for chunks in await asyncio.gather(*readers):
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["error"]
        assert "scheduler bug" in (chunks[-1].error or "")
    assert not worker.is_ready()
    with pytest.raises(EngineError, match="scheduler bug"):
        await read(worker, ask("late"))
    with pytest.raises(EngineError, match="scheduler bug"):
        worker.load_adapter("a", Path("anywhere"))


async def test_requests_racing_with_the_death_of_the_thread_all_end(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(engine)

    async def attempt(name: str) -> str:
        try:
            return (await read(worker, ask(name, max_tokens=50)))[-1].finish_reason or "none"
        except EngineError:
            return "refused"

    readers = []
    for i in range(60):
        readers.append(asyncio.create_task(attempt(str(i))))
        await asyncio.sleep(0.001)
        if i == 30:
            monkeypatch.setattr(engine, "has_work", lambda: 1 / 0)
    ends = await asyncio.gather(*readers)
    assert set(ends) <= {"length", "error", "refused"}
    assert "refused" in ends


async def test_a_frozen_step_makes_the_worker_not_ready_until_it_returns(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    worker = start(engine, frozen_after_s=0.1, unmeasured_s=0.1)
    await asyncio.sleep(0.2)
    assert worker.is_ready(), "idle is not frozen"
    reader = asyncio.create_task(read(worker, ask(max_tokens=3)))
    await until(gate.entered.is_set)
    await until(lambda: not worker.is_ready())
    assert worker.stats().seconds_since_step > 0.1
    gate.open.set()
    assert len(await reader) == 3
    await until(worker.is_ready)


async def test_stopping_a_frozen_worker_ends_its_requests_without_it(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    worker = start(engine, join_s=0.05)
    reader = asyncio.create_task(read(worker, ask()))
    await until(gate.entered.is_set)
    await asyncio.to_thread(worker.stop)
    (last,) = await reader
    assert (last.finish_reason, "did not return" in (last.error or "")) == ("error", True)
    gate.open.set()


# ---- start and stop


async def test_a_worker_is_ready_only_between_start_and_stop(engine: Engine) -> None:
    worker = Worker(engine)
    assert not worker.is_ready()
    with pytest.raises(EngineError, match="not been started"):
        await read(worker, ask())
    worker.start()
    assert worker.is_ready()
    await asyncio.to_thread(worker.stop)
    assert not worker.is_ready()
    with pytest.raises(EngineError, match="has stopped"):
        await read(worker, ask())
    worker.stop()


async def test_draining_finishes_what_is_in_work_and_takes_no_more(engine: Engine, start: Start) -> None:
    worker = start(engine)
    reader = asyncio.create_task(read(worker, ask(max_tokens=200)))
    await until(lambda: engine.stats().generation_tokens_total > 0)
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop, PATIENCE_S))
    await until(lambda: not worker.is_ready())
    with pytest.raises(Overloaded) as caught:
        await read(worker, ask("late"))
    assert caught.value.retry_after_s >= 1
    chunks = await reader
    assert (len(chunks), chunks[-1].finish_reason) == (200, "length")
    await stopping


async def test_what_is_not_done_in_time_is_cancelled_and_says_so(
    engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, run = start(engine), engine._runner.run

    def slowly(slices: Any) -> torch.Tensor:
        time.sleep(0.01)
        return run(slices)

    monkeypatch.setattr(engine._runner, "run", slowly)
    readers = [asyncio.create_task(read(worker, ask(str(i)))) for i in range(20)]
    await until(lambda: engine.stats().generation_tokens_total > 0)
    await asyncio.to_thread(worker.stop, 0.05)
    for chunks in await asyncio.gather(*readers):
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["cancelled"]
        assert chunks[-1].error == "the server has stopped"
    assert not engine.has_work()


# ---- adapters


async def test_adapters_are_changed_between_steps(engine: Engine, start: Start, tmp_path: Path) -> None:
    worker, thread = start(engine), []
    load = engine.load_adapter
    engine.load_adapter = lambda *a: thread.append(threading.current_thread().name) or load(*a)  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        await asyncio.wrap_future(worker.load_adapter("a", tmp_path))
    with pytest.raises(ModelNotFound):
        await asyncio.wrap_future(worker.unload_adapter("a"))
    assert thread == ["pingjia-engine"]
    assert WorkerSettings().frozen_after_s > 0
