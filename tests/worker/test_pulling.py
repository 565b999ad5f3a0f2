"""A worker whose engine is dead does not stay: whoever watches the process must see it."""

from __future__ import annotations

import pytest

from pingjia.errors import EngineError
from pingjia.queue.memory import MemoryQueue
from pingjia.types import EngineStats
from pingjia.worker.pulling import pull, worker_name


class Dead:
    def models(self):
        return []

    def stats(self):
        return EngineStats()

    def is_ready(self):
        return False


def test_a_dead_engine_ends_the_process():
    names = []
    with pytest.raises(EngineError, match="the engine died"):
        pull(Dead(), MemoryQueue, seats=1, lease_s=1.0, drain_s=5.0, is_alive=lambda: False, on_ready=names.append)
    assert len(names) == 1


def test_a_restarted_worker_is_another_one():
    assert worker_name() != worker_name()
