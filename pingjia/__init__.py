"""pingjia: from a JSONL file of questions and answers to a tuned, compressed, served model, and the bill for it.

The names below load their room on first use, so that `import pingjia` stays light and never imports torch by itself.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "Grammar", "Message", "Sampling", "__version__"]

if TYPE_CHECKING:
    from pingjia.engine import Engine
    from pingjia.types import Grammar, Message, Sampling


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from pingjia.engine import Engine

        return Engine
    if name in ("Grammar", "Message", "Sampling"):
        from pingjia import types

        return getattr(types, name)
    raise AttributeError(f"module 'pingjia' has no attribute {name!r}")
