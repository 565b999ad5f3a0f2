"""An engine on a tiny random network for the worker to run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pingjia.engine import Engine, EngineSettings
from pingjia.worker import Worker, WorkerSettings

# Test folders are no packages: the tiny network is made where the engine's own tests make it.
_spec = importlib.util.spec_from_file_location(
    "engine_conftest", Path(__file__).resolve().parents[1] / "engine" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_engine = importlib.util.module_from_spec(_spec)
sys.modules["engine_conftest"] = _engine
_spec.loader.exec_module(_engine)


def make_engine(**settings: Any) -> Engine:
    return Engine(_engine.make_tiny_model(), tokenizer=_engine.LetterTokenizer(), settings=EngineSettings(**settings))


@pytest.fixture
def engine() -> Engine:
    return make_engine()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """start(engine, **settings) -> a running worker, stopped after the test."""
    workers: list[Worker] = []

    def make(engine: Engine, **settings: Any) -> Worker:
        workers.append(Worker(engine, WorkerSettings(**settings)))
        workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()
