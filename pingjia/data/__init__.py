"""User files -> checked examples -> encoded examples. Never imports torch."""

from typing import TYPE_CHECKING, Any

__all__ = [
    "CheckReport",
    "Job",
    "Prepared",
    "Problem",
    "Tools",
    "check_files",
    "encode_examples",
    "estimate_rows",
    "fingerprint",
    "prepare",
    "read_examples",
    "resolve",
]

if TYPE_CHECKING:
    from pingjia.data.check import CheckReport, check_files
    from pingjia.data.encode import encode_examples
    from pingjia.data.files import estimate_rows, fingerprint, resolve
    from pingjia.data.prepared import Job, Prepared, Tools, prepare
    from pingjia.data.problems import Problem
    from pingjia.data.read import read_examples

_HOMES = {
    "CheckReport": "check",
    "Job": "prepared",
    "Prepared": "prepared",
    "Problem": "problems",
    "Tools": "prepared",
    "check_files": "check",
    "encode_examples": "encode",
    "estimate_rows": "files",
    "fingerprint": "files",
    "prepare": "prepared",
    "read_examples": "read",
    "resolve": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.data' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pingjia.data.{_HOMES[name]}"), name)
