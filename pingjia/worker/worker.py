"""One engine in one thread, and the async streams that read from it (pingjia.types.Backend).

Everything that touches the engine runs in that thread: requests, cancellations and adapter changes cross to it as
functions in a queue, chunks cross back through `consumer.deliver`. Every accepted request ends exactly once, also
when the thread dies or is stuck.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from pingjia.engine import Engine
from pingjia.errors import EngineError, Overloaded, RequestError
from pingjia.types import Chunk, EngineStats, ModelCard, Request
from pingjia.worker.consumer import Consumer, deliver
from pingjia.worker.settings import WorkerSettings
from pingjia.worker.step_clock import StepClock

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Command:
    """Something for the engine's thread to do; `refuse` instead, when there is no such thread any more."""

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda error: None


class Worker:
    """Runs an engine. The engine belongs to the worker from `start` to the end of `stop`."""

    def __init__(self, engine: Engine, settings: WorkerSettings | None = None) -> None:
        self.engine = engine
        self._settings = settings or WorkerSettings()
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._consumers: dict[str, Consumer] = {}
        self._lock = threading.Lock()
        self._one_less = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="pingjia-engine", daemon=True)
        self._closed_because: str | None = "the worker has not been started"
        self._drain_until: float | None = None
        self._is_stopping = False
        self._clock = StepClock(self._settings)
        self._busy_since: float | None = None
        self._may_take_s = self._settings.unmeasured_s
        self._tokens_after_disconnect = 0

    # ---- from any thread

    def start(self) -> None:
        """Start the engine's thread. Once only."""
        self._closed_because = None
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those in work finish for up to `drain_s`, cancel the rest, end the thread.

        Blocks: call it outside the event loop, or through `asyncio.to_thread`. A step that does not return within
        `join_s` is given up: its requests end with an error.
        """
        self._drain_until = time.monotonic() + drain_s
        if not self._thread.is_alive():
            return
        with self._lock:
            self._one_less.wait_for(lambda: not self._consumers, timeout=drain_s)
        self._is_stopping = True
        self._inbox.put(_Command(lambda: None))  # wakes a thread that waits for work
        self._thread.join(self._settings.join_s)
        self._close("the engine did not return from its last step", Chunk(finish_reason="error"))

    def models(self) -> list[ModelCard]:
        """The base model, then the adapters."""
        return self.engine.models()

    def stats(self) -> EngineStats:
        """The engine's snapshot, and what was computed for nobody."""
        return replace(self.engine.stats(), tokens_after_disconnect_total=self._tokens_after_disconnect)

    def is_ready(self) -> bool:
        """Whether a token could come out now: started, alive, not draining, and not stuck in a step."""
        if self._closed_because is not None or not self._thread.is_alive() or self._drain_until is not None:
            return False
        busy_since = self._busy_since
        return busy_since is None or time.monotonic() - busy_since < self._may_take_s

    def is_alive(self) -> bool:
        """Whether the engine's thread runs. False after `stop`, and for good after an error in the engine itself."""
        return self._thread.is_alive()

    def load_adapter(self, name: str, path: str | Path) -> Future[None]:
        """Between two steps, serve the adapter at `path` as `name`; the future raises as Engine.load_adapter does."""
        return self._call(lambda: self.engine.load_adapter(name, path))

    def unload_adapter(self, name: str) -> Future[None]:
        """Between two steps, stop serving an adapter; the future raises as Engine.unload_adapter does."""
        return self._call(lambda: self.engine.unload_adapter(name))

    def _call(self, function: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                function()
                future.set_result(None)
            except Exception as e:
                future.set_exception(e)

        with self._lock:
            self._refuse_closed()
            self._inbox.put(_Command(run, future.set_exception))
        return future

    # ---- from an event loop

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Yield the chunks of one request; the last has `finish_reason`. Closing the iterator cancels within one step.

        Raises RequestError when the engine refuses it, Overloaded while draining, EngineError when it is not running.
        """
        if request.sampling.grammar is not None:  # compiled here, so that no step waits for it
            await asyncio.to_thread(self.engine.prepare, request.sampling)
        consumer = self._join(Consumer(request))
        try:
            while True:
                item = await consumer.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._leave(consumer)

    def _join(self, consumer: Consumer) -> Consumer:
        request_id = consumer.request.id
        with self._lock:
            self._refuse_closed()
            if self._drain_until is not None:
                raise Overloaded("the server is stopping", retry_after_s=max(self._drain_until - time.monotonic(), 1.0))
            if request_id in self._consumers:
                raise RequestError(f"a request with id {request_id!r} is already running", param="id")
            self._consumers[request_id] = consumer
            self._inbox.put(_Command(lambda: self._add(consumer)))
        return consumer

    def _leave(self, consumer: Consumer) -> None:
        with self._lock:
            consumer.is_gone = True
            if self._consumers.get(consumer.request.id) is consumer:
                self._inbox.put(_Command(lambda: self.engine.cancel(consumer.request.id)))

    def _refuse_closed(self) -> None:
        if self._closed_because is not None:
            raise EngineError(self._closed_because)

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._obey()
                if self.engine.has_work():
                    self._step()
            self._finish()
        except BaseException as e:
            _log.exception("the engine's thread died")
            why = f"the engine stopped: {type(e).__name__}: {e}"
            self._close(why, Chunk(finish_reason="error"))

    def _obey(self) -> None:
        """Do what came in, after waiting for something if there is nothing else to do."""
        self._busy_since = None
        commands = [] if self.engine.has_work() else [self._inbox.get()]
        self._may_take_s = self._settings.unmeasured_s  # an adapter may be loaded
        self._busy_since = time.monotonic()
        for command in itertools.chain(commands, self._commands()):
            command.run()

    def _commands(self) -> Iterator[_Command]:
        """What is in the inbox now, without waiting."""
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _add(self, consumer: Consumer) -> None:
        try:
            self.engine.add(consumer.request)
        except Exception as e:
            self._forget([consumer])
            deliver([(consumer, e)])

    def _step(self) -> None:
        started = time.monotonic()
        self._may_take_s, self._busy_since = self._clock.limit_s(self._num_prompt()), started
        news = self.engine.step()
        sizes = self.engine.step_tokens.values()
        self._clock.add(max(sizes, default=0), sum(sizes), time.monotonic() - started)
        self._pass_on(news)

    def _num_prompt(self) -> int:
        """Prompt tokens the next step may have to read: at most, because some may be cached or cut."""
        consumers = list(self._consumers.values())
        is_crowded = self.engine.stats().num_waiting > 0  # then one that has begun may have to be read again
        return sum(len(c.request.prompt_ids) for c in consumers if is_crowded or not c.has_begun)

    def _pass_on(self, news: Sequence[tuple[str, Chunk]]) -> None:
        for request_id, num_tokens in self.engine.step_tokens.items():
            consumer = self._consumers.get(request_id)
            if consumer is not None and consumer.is_gone:
                self._tokens_after_disconnect += num_tokens
        items = [(self._consumers[request_id], chunk) for request_id, chunk in news if request_id in self._consumers]
        for consumer, _ in items:
            consumer.has_begun = True
        self._forget([consumer for consumer, chunk in items if chunk.finish_reason is not None])
        for consumer in deliver(items):
            self.engine.cancel(consumer.request.id)

    def _forget(self, consumers: list[Consumer]) -> None:
        with self._lock:
            for consumer in consumers:
                self._consumers.pop(consumer.request.id, None)
            self._one_less.notify_all()

    def _finish(self) -> None:
        """The orderly end: what is still running is cancelled, and the engine is left empty."""
        for request_id in list(self._consumers):
            self.engine.cancel(request_id)
        self.engine.step()
        self._close("the server has stopped", Chunk(finish_reason="cancelled"))

    def _close(self, why: str, last: Chunk) -> None:
        """Take nothing more and end whatever has not ended. From then on `stream` raises at once."""
        with self._lock:
            if self._closed_because is None:
                self._closed_because = why
            consumers, self._consumers = list(self._consumers.values()), {}
            self._one_less.notify_all()
        deliver([(consumer, replace(last, error=why)) for consumer in consumers])
        for command in self._commands():
            command.refuse(EngineError(why))
