"""Networks and their weights. The public names load torch on first use; `pingjia.models.settings` never does."""

from typing import TYPE_CHECKING, Any

__all__ = [
    "Encoder",
    "Family",
    "added_tokens",
    "base_fingerprint",
    "extend_model",
    "family_of",
    "load_encoder",
    "load_model",
    "max_model_len",
    "use_packed_attention",
]

if TYPE_CHECKING:
    from pingjia.models.attention import use_packed_attention
    from pingjia.models.encoder import Encoder, load_encoder
    from pingjia.models.family import Family
    from pingjia.models.fingerprint import base_fingerprint
    from pingjia.models.loader import load_model, max_model_len
    from pingjia.models.registry import family_of
    from pingjia.models.vocabulary import added_tokens, extend_model

_HOMES = {
    "Encoder": "encoder",
    "Family": "family",
    "added_tokens": "vocabulary",
    "base_fingerprint": "fingerprint",
    "extend_model": "vocabulary",
    "family_of": "registry",
    "load_encoder": "encoder",
    "load_model": "loader",
    "max_model_len": "loader",
    "use_packed_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.models' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.models.{_HOMES[name]}"), name)
