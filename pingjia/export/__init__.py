"""What a tuned model is handed over as. Loads torch on first use."""

from typing import TYPE_CHECKING, Any

__all__ = ["ExportReport", "check_export", "export_model", "merge_adapter"]

if TYPE_CHECKING:
    from pingjia.export.check import check_export
    from pingjia.export.copy import export_model
    from pingjia.export.merge import ExportReport, merge_adapter

_HOMES = {"ExportReport": "merge", "check_export": "check", "export_model": "copy", "merge_adapter": "merge"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.export.{_HOMES[name]}"), name)
