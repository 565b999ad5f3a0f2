"""One engine behind a thread: the only place where its thread meets asyncio.

The public names load torch on first use; `pingjia.worker.settings` never does.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Worker", "WorkerSettings"]

if TYPE_CHECKING:
    from pingjia.worker.settings import WorkerSettings
    from pingjia.worker.worker import Worker

_HOMES = {"Worker": "worker", "WorkerSettings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.worker' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.worker.{_HOMES[name]}"), name)
