"""One function over many chunks of rows: in this process, in several, or on Ray. The results are the same, in order.

Knows nothing of what the function does. Memory: a few chunks per process.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from pingjia.errors import DataError, PingjiaError, StorageError

C = TypeVar("C")
R = TypeVar("R")
Engine = Literal["local", "ray"]


Factory = Callable[[], Callable[[C], R]]
"""Picklable; loads what a process needs (a tokenizer) and returns what is called with one chunk after the other."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Where chunks are worked on. `staging`: a directory that all machines of a Ray cluster can read and write."""

    engine: Engine = "local"
    processes: int = 1
    staging: Path | None = None

    def map(self, factory: Factory[C, R], chunks: Iterator[C]) -> Iterator[R]:
        """Yield the results in the order of the chunks. Errors of the worker come up as they are."""
        if self.engine == "ray":
            assert self.staging is not None
            return _on_ray(factory, chunks, self.processes, self.staging)
        return _here(factory, chunks) if self.processes == 1 else _in_processes(factory, chunks, self.processes)


def _here(factory: Factory[C, R], chunks: Iterator[C]) -> Iterator[R]:
    worker = factory()
    for chunk in chunks:
        yield worker(chunk)


# ---- several processes

_worker: Callable[[Any], Any] | None = None  # of this process


def _start(factory: Factory[Any, Any]) -> None:
    global _worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    _worker = factory()


def _work(chunk: Any) -> Any:
    assert _worker is not None
    return _worker(chunk)


def _in_processes(factory: Factory[C, R], chunks: Iterator[C], processes: int) -> Iterator[R]:
    # spawn: a fork of a process with threads (tokenizers, torch) may hang.
    executor = ProcessPoolExecutor(processes, get_context("spawn"), _start, (factory,))
    waiting: deque[Future[R]] = deque()
    try:
        for chunk in chunks:
            waiting.append(executor.submit(_work, chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {processes} processes was killed, most likely for want of memory; the same command goes on from "
            "the last finished part: give it fewer with prepare.processes=1"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


# ---- Ray


class _RayWorker:
    """What Ray keeps in its actors: turns rows of the staged files into rows of results."""

    def __init__(self, factory: bytes) -> None:
        self._worker: Callable[[Any], Any] = pickle.loads(factory)()  # noqa: S301  we pickled it ourselves, a moment ago

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        numbers, results = [], []
        for number, name in zip(batch["number"], batch["chunk"], strict=True):
            chunk = pickle.loads(Path(str(name)).read_bytes())  # noqa: S301  as above
            try:
                result: Any = self._worker(chunk)
            except PingjiaError as e:  # Ray would wrap it in an error of its own
                result = e
            numbers.append(int(number))
            results.append(pickle.dumps(result))
        return {"number": np.array(numbers), "result": np.array(results, dtype=object)}


def _on_ray(factory: Factory[C, R], chunks: Iterator[C], processes: int, staging: Path) -> Iterator[R]:
    ray = _import_ray()
    names = _stage(chunks, staging)
    if not names:
        return
    if not ray.is_initialized():
        ray.init(num_cpus=None, include_dashboard=False, log_to_driver=False, configure_logging=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [{"number": number, "chunk": str(name)} for number, name in enumerate(names)]
    actors = min(processes, len(names))
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=[pickle.dumps(factory)],
    )
    for expected, row in enumerate(results.iter_rows()):
        assert row["number"] == expected
        result = pickle.loads(row["result"])  # noqa: S301  as above
        if isinstance(result, PingjiaError):
            raise result
        names[expected].unlink()
        yield result


def _stage(chunks: Iterator[C], staging: Path) -> list[Path]:
    """Every chunk as a file, so that Ray moves names and not rows."""
    names = []
    try:
        staging.mkdir(parents=True, exist_ok=True)
        for number, chunk in enumerate(chunks):
            name = (staging / f"chunk-{number:06}.pickle").absolute()
            name.write_bytes(pickle.dumps(chunk))
            names.append(name)
    except OSError as e:
        raise StorageError(f"{staging}: a chunk could not be written: {e.strerror or e}") from None
    return names


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise DataError(
            "prepare.engine is ray, but Ray is not installed: pip install 'pingjia[ray]', or set prepare.engine=local"
        ) from None
    return ray
