"""From a prompt to tokens: sequences, pages and scheduler (pure), runner and sampler (device), the engine (step).

The public names load torch on first use; `pingjia.engine.settings` never does.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Engine", "EngineSettings"]

if TYPE_CHECKING:
    from pingjia.engine.engine import Engine
    from pingjia.engine.settings import EngineSettings

_HOMES = {"Engine": "engine", "EngineSettings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.engine.{_HOMES[name]}"), name)
