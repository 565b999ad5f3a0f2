"""Requests on their way from a gateway to a worker and their answers on the way back. Never imports torch or HTTP.

`protocol.Queue` is the promise, kept by `memory.MemoryQueue` (in one process) and `streams.StreamQueue` (Redis);
`policy` decides, `puller.Puller` feeds a backend from a queue, `backend.QueueBackend` is a queue seen from a gateway.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Job", "Limits", "MemoryQueue", "Puller", "Queue", "QueueBackend", "open_queue"]

if TYPE_CHECKING:
    from pingjia.queue.backend import QueueBackend
    from pingjia.queue.job import Job
    from pingjia.queue.memory import MemoryQueue
    from pingjia.queue.opening import open_queue
    from pingjia.queue.policy import Limits
    from pingjia.queue.protocol import Queue
    from pingjia.queue.puller import Puller

_HOMES = {
    "Job": "job",
    "Limits": "policy",
    "MemoryQueue": "memory",
    "Puller": "puller",
    "Queue": "protocol",
    "QueueBackend": "backend",
    "open_queue": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.queue' has no attribute {name!r}")
    return getattr(import_module(f"pingjia.queue.{_HOMES[name]}"), name)
