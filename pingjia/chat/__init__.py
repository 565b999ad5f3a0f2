"""A conversation <-> token ids: templates, tokenizers, streaming detokeniser.

The only place that does this, for training, serving and evaluation alike. Never imports torch.
"""

from typing import TYPE_CHECKING, Any

from pingjia.chat.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "check_golden", "golden_chats", "load_tokenizer"]

if TYPE_CHECKING:
    from pingjia.chat.golden import check_golden, golden_chats
    from pingjia.chat.load import load_tokenizer


def __getattr__(name: str) -> Any:
    if name == "load_tokenizer":
        from pingjia.chat.load import load_tokenizer

        return load_tokenizer
    if name in ("check_golden", "golden_chats"):
        from pingjia.chat import golden

        return getattr(golden, name)
    raise AttributeError(f"module 'pingjia.chat' has no attribute {name!r}")
