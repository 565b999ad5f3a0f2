"""One thread that takes an engine's steps for callers in event loops, however many loops and callers there are.

It lives while somebody waits: started by the first, gone with the last. One thread and not one per caller, because
every thread that computes gets a team of OpenMP threads of its own. Serving over HTTP is `pingjia.worker.Worker`'s,
which also drains, watches for stuck steps and says when it is ready.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from pingjia.errors import EngineError
from pingjia.types import Chunk, Request

_log = logging.getLogger(__name__)
News = tuple[str, Chunk]
Box = deque[News]


class Steps(Protocol):
    """What the driver needs of an engine; each call takes the engine's lock."""

    def enter(self, requests: Sequence[Request], box: Box) -> None:
        """Accept all requests, or none and raise; what comes for them goes to `box`."""
        ...

    def advance(self, box: Box) -> list[News]:
        """What is new for the box, after a step if there was nothing."""
        ...

    def leave(self, requests: Sequence[Request]) -> None:
        """Forget the requests; those that have not ended are cancelled."""
        ...


class _Listener:
    """One caller. Created in the loop that reads `queue`; `is_gone` is set there and read by the driver's thread."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.unfinished = {request.id for request in requests}
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[list[News] | Exception] = asyncio.Queue()
        self.is_gone = False

    def deliver(self, item: list[News] | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop is closed
            self.is_gone = True


class Driver:
    """See the top of the file. Safe to use from several threads and event loops."""

    def __init__(self, engine: Steps) -> None:
        self._engine = engine
        self._box: Box = deque()
        self._lock = threading.Lock()
        self._arrived: list[_Listener] = []
        self._thread: threading.Thread | None = None

    async def follow(self, requests: Sequence[Request]) -> AsyncGenerator[News, None]:
        """Have the requests computed; yield their chunks. Closing the iterator cancels them before the next step."""
        listener = _Listener(requests)
        unfinished = set(listener.unfinished)
        if unfinished:
            self._welcome(listener)
        try:
            while unfinished:
                item = await listener.queue.get()
                if isinstance(item, Exception):
                    raise item
                for request_id, chunk in item:
                    if chunk.finish_reason is not None:
                        unfinished.discard(request_id)
                    yield request_id, chunk
        finally:
            listener.is_gone = True

    def _welcome(self, listener: _Listener) -> None:
        with self._lock:
            self._arrived.append(listener)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pingjia-driver", daemon=True)
                self._thread.start()

    # ---- in the driver's thread

    def _run(self) -> None:
        present: list[_Listener] = []
        try:
            while self._gather(present):
                self._see_off(present)
                if present:
                    self._hand_out(self._engine.advance(self._box), present)
        except BaseException as e:
            _log.exception("the thread that drives the engine died")
            self._give_up(present, EngineError(f"the engine stopped: {type(e).__name__}: {e}"))

    def _gather(self, present: list[_Listener]) -> bool:
        """Let in whoever has arrived; False when nobody is left, and the thread is over."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            if not arrived and not present:
                self._thread = None
                return False
        for listener in arrived:
            try:
                self._engine.enter(listener.requests, self._box)
                present.append(listener)
            except Exception as e:
                listener.deliver(e)
        return True

    def _see_off(self, present: list[_Listener]) -> None:
        for listener in [one for one in present if one.is_gone or not one.unfinished]:
            present.remove(listener)
            self._engine.leave(listener.requests)

    def _hand_out(self, news: list[News], present: list[_Listener]) -> None:
        for listener in present:
            own = [(request_id, chunk) for request_id, chunk in news if request_id in listener.unfinished]
            listener.unfinished -= {request_id for request_id, chunk in own if chunk.finish_reason is not None}
            if own:
                listener.deliver(own)

    def _give_up(self, present: list[_Listener], error: EngineError) -> None:
        with self._lock:
            listeners, self._arrived, self._thread = present + self._arrived, [], None
        for listener in listeners:
            listener.deliver(error)
