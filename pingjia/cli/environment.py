"""Every flag of a verb can be given in the environment: PINGJIA_ and its name. The command line wins."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import TypeVar, get_type_hints

from typer.models import ParameterInfo

F = TypeVar("F", bound=Callable[..., object])


def twin_of(parameter: str, flags: tuple[str, ...]) -> str:
    """The variable of a parameter with these flags: that of its long flag, else of its own name."""
    long = next((flag for flag in flags if flag.startswith("--")), parameter)
    return "PINGJIA_" + long.partition("/")[0].strip("-").replace("-", "_").upper()


def wants_debug() -> bool:
    """Whether the command line or PINGJIA_DEBUG asks for the messages of our own errors."""
    return "--debug" in sys.argv or bool(os.environ.get("PINGJIA_DEBUG"))


def with_environment(verb: F) -> F:
    """The verb, each of its parameters with a variable. Lists are separated by spaces."""
    hints = get_type_hints(verb, include_extras=True)
    for name in inspect.signature(verb).parameters:
        for info in getattr(hints[name], "__metadata__", ()):
            if isinstance(info, ParameterInfo) and info.envvar is None:
                first = info.default  # in Annotated, the first flag lands here
                flags = (first,) if isinstance(first, str) else ()
                info.envvar = twin_of(name, (*flags, *(info.param_decls or ())))
    verb.__annotations__ = hints  # as text they would be read anew, without what was added
    return verb
