"""What a tuned model is handed over as. Loads torch on first use."""

from typing import TYPE_CHECKING, Any

__all__ = ["ExportReport", "merge_adapter"]

if TYPE_CHECKING:
    from pingjia.export.merge import ExportReport, merge_adapter


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pingjia.export' has no attribute {name!r}")
    from pingjia.export import merge

    return getattr(merge, name)
