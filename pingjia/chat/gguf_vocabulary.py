"""A byte-level BPE vocabulary in GGUF metadata -> a `tokenizers.Tokenizer`.

GGUF names the way text is split before merging (`tokenizer.ggml.pre`) but does not hold it; the published splits of
the names known here are below, and any other name is refused: a wrong split gives wrong ids without any error. Not
here: reading the file (`gguf_file.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from pingjia.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEXES = {"qwen2": rf"{_WORDS}|\p{{N}}|{_REST}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"}
SPLITS = ("smollm", *_REGEXES)


def build_vocabulary(metadata: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer described by GGUF metadata. ModelError for a kind that is not known for certain."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in SPLITS:
        raise ModelError(
            f"{path}: tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported (supported: "
            f"'gpt2' with {', '.join(SPLITS)}); use the model's directory with its tokenizer.json instead"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    vocabulary = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    _add_marked(vocabulary, tokens, kinds)
    _set_pipeline(vocabulary, pre)
    _set_bos(vocabulary, metadata, tokens, default=pre == "llama-bpe")
    return vocabulary


def _add_marked(vocabulary: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Make control tokens special and user-defined tokens whole."""
    marked = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    vocabulary.add_tokens([AddedToken(t, normalized=False, special=k == _CONTROL) for t, k in marked])


def _set_pipeline(vocabulary: tokenizers.Tokenizer, pre: str) -> None:
    vocabulary.pre_tokenizer = _splitter(pre)
    vocabulary.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        vocabulary.normalizer = normalizers.NFC()


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        # SmolLM2 was trained with every digit apart, *before* the byte-level split: "a  1" is a, two spaces, 1.
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(tokenizers.Regex(_REGEXES[pre]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    return pre_tokenizers.Sequence([first, byte_level])


def _set_bos(vocabulary: tokenizers.Tokenizer, metadata: dict[str, Any], tokens: list[str], *, default: bool) -> None:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default):
        vocabulary.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0", special_tokens=[(tokens[bos], bos)]
        )
