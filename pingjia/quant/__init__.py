"""INT8 and INT4 weights: formats, conversion, products. The public names load torch on first use."""

from typing import TYPE_CHECKING, Any

__all__ = [
    "FORMATS",
    "HalfLinear",
    "Int4Linear",
    "Int8Linear",
    "count_weights",
    "prepare_for_inference",
    "quantize_model",
]

if TYPE_CHECKING:
    from pingjia.quant.convert import count_weights, quantize_model
    from pingjia.quant.formats import FORMATS, Int4Linear, Int8Linear
    from pingjia.quant.half import HalfLinear
    from pingjia.quant.tiled import prepare_for_inference

_HOMES = {
    "FORMATS": "formats",
    "HalfLinear": "half",
    "Int4Linear": "formats",
    "Int8Linear": "formats",
    "count_weights": "convert",
    "prepare_for_inference": "tiled",
    "quantize_model": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.quant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.quant.{_HOMES[name]}"), name)
