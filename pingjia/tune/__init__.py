"""Training. The public names load torch on first use; `pingjia.tune.settings` never does."""

import logging
from typing import TYPE_CHECKING, Any

__all__ = ["Hooks", "TrainPlan", "TrainResult", "train"]

if TYPE_CHECKING:
    from pingjia.tune.run import Hooks, TrainPlan, TrainResult, train

# PEFT imports bitsandbytes wherever it is installed, and that warns of kernels which nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pingjia.tune' has no attribute {name!r}")
    from pingjia.tune import run

    return getattr(run, name)
