"""Where a model's tokenizer lies on disk, and how to read it.

Here: which files say what (vocabulary, template, special tokens, stop tokens). Not here: what they mean
(`hf.py`, `chatglm.py`, `gguf_vocabulary.py`). Downloads nothing, runs no code of a model directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pingjia.chat.hf import HFTokenizer, Parts
from pingjia.chat.template import PLAIN, ChatTemplate
from pingjia.chat.tokenizer import Tokenizer
from pingjia.errors import ModelError
from pingjia.locate import locate_model

if TYPE_CHECKING:
    import tokenizers

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OTHER_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(path: str | Path, *, template: str | None = None) -> Tokenizer:
    """The tokenizer of a model: a directory, a .gguf file, or a packaged name such as "smollm2".

    `template` replaces the model's own chat template: Jinja source, or "plain" for the form 问：…/答：…. A model
    without any template loads too; only rendering conversations with it is an error. ChatGLM has its own fixed form.
    Raises ModelError, in one line, when there is no tokenizer or it cannot be read.
    """
    found = locate_model(path)
    if found.is_file():
        return HFTokenizer(_parts_of_gguf(found, template))
    if _is_chatglm(found):
        if template is not None:
            raise ModelError(f"{found}: ChatGLM models have one fixed form of conversation; leave template out")
        from pingjia.chat.chatglm import load as load_chatglm

        return load_chatglm(found)
    return HFTokenizer(_parts_of_directory(found, template))


def _is_chatglm(directory: Path) -> bool:
    if (directory / "ice_text.model").is_file():
        return True
    if not (directory / "tokenizer.model").is_file():
        return False
    tokenizer_class = _read_json(directory / "tokenizer_config.json").get("tokenizer_class")
    if tokenizer_class == "ChatGLM4Tokenizer":
        raise ModelError(
            f"{directory}: this GLM-4 directory needs code of its own for its tokenizer; use the '-hf' edition of the "
            "model, which has a tokenizer.json"
        )
    model_type = _read_json(directory / "config.json").get("model_type")
    return tokenizer_class == "ChatGLMTokenizer" or model_type == "chatglm"


# ---- a directory


def _parts_of_directory(directory: Path, template: str | None) -> Parts:
    config = _read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        vocabulary, known = _read_vocabulary(directory / "tokenizer.json"), dict[str, str]()
    elif any((directory / name).is_file() for name in _OTHER_VOCABULARIES):
        vocabulary, known = _convert(directory)
    else:
        raise ModelError(
            f"{directory}: no tokenizer here (no tokenizer.json, tokenizer.model, vocab.json or vocab.txt); copy the "
            "tokenizer files of the model into it"
        )
    tokens = known | _named_tokens(config, vocabulary)
    source = template or _template_source(directory, config)
    return _parts(vocabulary, tokens, source, _stop_ids(directory, config, tokens, vocabulary))


def _parts(vocabulary: tokenizers.Tokenizer, tokens: dict[str, str], source: str | None, stop_ids: set[int]) -> Parts:
    vocabulary.no_truncation()
    vocabulary.no_padding()
    _make_special(vocabulary, tokens)
    pad_id = _pad_id(vocabulary, tokens, stop_ids)
    return Parts(
        vocabulary=vocabulary,
        template=ChatTemplate(PLAIN if source == "plain" else source, tokens) if source else None,
        tokens=tokens,
        stop_ids=frozenset(stop_ids),
        pad_id=pad_id,
    )


def _pad_id(vocabulary: tokenizers.Tokenizer, tokens: dict[str, str], stop_ids: set[int]) -> int:
    """The pad token; without one, the eos token. Padding is never attended to, so any token would do."""
    name = tokens.get("pad_token") or tokens.get("eos_token")
    named = vocabulary.token_to_id(name) if name else None
    return named if named is not None else min(stop_ids, default=0)


def _make_special(vocabulary: tokenizers.Tokenizer, tokens: dict[str, str]) -> None:
    """Old files name their eos without marking it special; text must not be able to spell it."""
    from tokenizers import AddedToken

    special = {t.content for t in vocabulary.get_added_tokens_decoder().values() if t.special}
    missing = [t for t in dict.fromkeys(tokens.values()) if t not in special]
    vocabulary.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])


def _read_vocabulary(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for every kind of bad file
        raise ModelError(f"{path}: not a readable tokenizer.json: {e}") from None


def _convert(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Older formats, through transformers, which knows how to convert them."""
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as e:  # dozens of converters with errors of their own
        first_line = str(e).strip().split("\n")[0]
        raise ModelError(f"{directory}: transformers cannot convert this tokenizer: {first_line}") from None
    vocabulary = getattr(converted, "backend_tokenizer", None)
    if vocabulary is None:
        raise ModelError(f"{directory}: this tokenizer ({type(converted).__name__}) has no tokenizer.json form")
    return vocabulary, {k: str(v) for k, v in converted.special_tokens_map.items() if k in _TOKEN_NAMES}


def _named_tokens(config: dict[str, Any], vocabulary: tokenizers.Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ... as strings; those that the vocabulary does not hold are left out."""
    tokens = {}
    for name in _TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and vocabulary.token_to_id(text) is not None:
            tokens[name] = text
    return tokens


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several templates by name
        named = {str(t.get("name")): t.get("template") for t in source if isinstance(t, dict)}
        if "default" not in named:
            raise ModelError(f"{directory}: tokenizer_config.json has templates {sorted(named)} but none named default")
        source = named["default"]
    if not isinstance(source, str | None):
        raise ModelError(f"{directory}: chat_template in tokenizer_config.json is a {type(source).__name__}, not text")
    return source


def _stop_ids(
    directory: Path, config: dict[str, Any], tokens: dict[str, str], vocabulary: tokenizers.Tokenizer
) -> set[int]:
    texts = config.get("stop_tokens", [])
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ModelError(f"{directory}: stop_tokens in tokenizer_config.json must be a list of strings")
    found = {vocabulary.token_to_id(t) for t in (*texts, tokens.get("eos_token")) if t}
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [value])
    return {i for i in found if isinstance(i, int) and vocabulary.id_to_token(i) is not None}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


# ---- a .gguf file


def _parts_of_gguf(path: Path, template: str | None) -> Parts:
    from pingjia.chat.gguf_file import read_metadata
    from pingjia.chat.gguf_vocabulary import build_vocabulary

    metadata = read_metadata(path)
    if "tokenizer.ggml.model" not in metadata:
        raise ModelError(f"{path}: no tokenizer in this GGUF file; use the model's directory with its tokenizer.json")
    try:
        vocabulary = build_vocabulary(metadata, path)
    except ModelError:
        raise
    except Exception as e:  # keys missing, or a vocabulary that the library refuses
        raise ModelError(f"{path}: the tokenizer in this GGUF file is not usable: {type(e).__name__}: {e}") from None
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    texts = {name: vocabulary.id_to_token(i) for name, i in ids.items() if i is not None}
    tokens = {name: text for name, text in texts.items() if text is not None}
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    stop_ids = {i for i in (ids["eos_token"], eot) if i is not None}
    return _parts(vocabulary, tokens, template or metadata.get("tokenizer.chat_template"), stop_ids)
