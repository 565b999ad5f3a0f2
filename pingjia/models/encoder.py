"""Texts -> vectors, by any BERT-like encoder in a directory. What BERTScore and grouping by meaning look at.

No remote code, no pickle: a directory must hold safetensors.

Shapes: B texts of a batch, T tokens of the longest of them, H numbers per vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models.device import pick_device
from pingjia.models.loader import quiet, read_config
from pingjia.similarity import Vectors

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_MAX_LENGTH = 512
_MAX_BATCH_TOKENS = 4096  # padding included; at 8192 MiniLM took 280 MB more, and no less time


def load_encoder(
    name: str | Path = "minilm",
    *,
    device: str = "cpu",
    layer: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Encoder:
    """An encoder by directory or packaged name.

    layer: whose hidden states are the token vectors (1 the first; None the last). max_length: tokens of a text that are
    read, [CLS] and [SEP] included; None is 512, or fewer where the network has fewer places. batch_size: texts that go
    through the network together, at most. Raises ModelError for a directory without an encoder, its tokenizer or
    safetensors, and for a layer or a length it has not.
    """
    directory = locate_model(name)
    _require_encoder(directory)
    tokenizer, model = _load(directory)
    num_layers = int(model.config.num_hidden_layers)
    if layer is not None and not 1 <= layer <= num_layers:
        raise ModelError(f"{name}: layer {layer}: the encoder has layers 1-{num_layers}")
    places = min(_MAX_LENGTH, _num_places(model))
    if max_length is not None and not 3 <= max_length <= places:
        raise ModelError(f"{name}: max_length {max_length}: the encoder reads 3 to {places} tokens")
    limits = _Limits(max_length or places, batch_size)
    return Encoder(model.to(pick_device(device)), tokenizer, layer or num_layers, limits, _pooling(directory))


def _require_encoder(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(f"{directory}: no encoder: give a directory with config.json, a tokenizer and *.safetensors")
    config = read_config(directory)
    kind = config["model_type"]
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.get("is_encoder_decoder") or config.get("is_decoder"):
        raise ModelError(f"{directory}: {kind} is no encoder: BERTScore needs a network such as BERT or RoBERTa")
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin"))
        hint = "; convert its .bin: AutoModel.from_pretrained(DIR).save_pretrained(DIR)" if pickled else ""
        raise ModelError(f"{directory}: no weights: *.safetensors is needed{hint}")
    # transformers 5 makes up an empty vocabulary where there is none.
    if not any(file for pattern in _VOCABULARIES for file in directory.glob(pattern)):
        raise ModelError(f"{directory}: no tokenizer: tokenizer.json, vocab.txt, vocab.json or *.model is needed")


def _load(directory: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # RoBERTa's first word is another token without a space before it. bert-score asks for the space; transformers 5
    # heeds that only when the tokenizer is loaded.
    spaced = {"add_prefix_space": True} if read_config(directory)["model_type"] == "roberta" else {}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right", **spaced, **safe)
            model, info = AutoModel.from_pretrained(
                directory,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **safe,
            )
    except Exception as e:  # transformers, tokenizers and safetensors each have their own error types
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ModelError(f"{directory}: cannot be loaded as an encoder: {reason[0]}") from None
    _refuse_other_weights(directory, info)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ModelError(f"{directory}: its tokenizer has no [CLS] and [SEP]; it is not an encoder's")
    return tokenizer, model.eval()


def _refuse_other_weights(directory: Path, info: dict[str, Any]) -> None:
    """transformers fills with noise what is missing. The pooler may be: hidden states do without it."""
    missing = {key for key in info["missing_keys"] if "pooler" not in key}
    wrong = sorted(missing | {key for key, *_ in info["mismatched_keys"]})
    if wrong:
        raise ModelError(
            f"{directory}: not the weights of this encoder: {len(wrong)} tensors are missing or of another shape, "
            f"first {wrong[0]}"
        )


def _num_places(model: PreTrainedModel) -> int:
    """Tokens that a text may have. RoBERTa's positions begin after that of the padding."""
    places = int(getattr(model.config, "max_position_embeddings", _MAX_LENGTH))
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    starts = [m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None]
    return places - max(starts, default=0)


@dataclass(frozen=True, slots=True)
class _Limits:
    max_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Pooling:
    """How the vectors of a text's tokens become one, as sentence-transformers notes it beside its models."""

    takes_first: bool = False
    max_length: int = _MAX_LENGTH


def _pooling(directory: Path) -> _Pooling:
    length = _read(directory / "sentence_bert_config.json").get("max_seq_length") or _MAX_LENGTH
    return _Pooling(bool(_read(directory / "1_Pooling" / "config.json").get("pooling_mode_cls_token")), length)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class _Batch:
    """`rows`: which of the texts. The last hidden states, and those of the layer that is compared."""

    rows: list[int]
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    last_BTH: torch.Tensor
    layer_BTH: torch.Tensor


class Encoder:
    """A `TextEncoder` (pingjia.similarity) over a transformers network. What is beyond `max_length` is not read."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        limits: _Limits,
        pooling: _Pooling,
    ) -> None:
        self._model, self._tokenizer, self._layer = model, tokenizer, layer
        self._limits, self._pooling = limits, pooling

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        """The hidden states of every token, of unit length, as the package bert-score takes them."""
        found: dict[int, Vectors] = {}
        for batch in self._run(texts, self._limits.max_length):
            unit_BTH = torch.nn.functional.normalize(batch.layer_BTH, dim=-1).numpy()
            sizes = batch.mask_BT.sum(1).tolist()
            for row, size, ids, vectors in zip(batch.rows, sizes, batch.ids_BT.tolist(), unit_BTH, strict=True):
                found[row] = self._vectors(ids[:size], vectors[:size].copy())  # a view would hold the whole batch
        return [found[row] for row in range(len(texts))]

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """One vector per text, float32 [N, H] of unit length, as sentence-transformers makes it: the mean over the
        tokens, or the first token's where the directory says so."""
        result = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        for batch in self._run(texts, min(self._limits.max_length, self._pooling.max_length)):
            weight = batch.mask_BT.unsqueeze(-1).float()
            mean = (batch.last_BTH * weight).sum(1) / weight.sum(1)
            pooled = batch.last_BTH[:, 0] if self._pooling.takes_first else mean
            result[batch.rows] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return result

    def unknown_share(self, texts: Sequence[str]) -> float:
        """The share of all tokens that the encoder has no entry for; 0 for a vocabulary of bytes."""
        rows = self._tokens(texts, self._limits.max_length)
        words = [token for ids in rows for token in ids if not self._is_mark(token)]
        return words.count(self._tokenizer.unk_token_id) / max(1, len(words))

    def _vectors(self, ids: list[int], vectors: np.ndarray) -> Vectors:
        is_mark = np.array([self._is_mark(token) for token in ids])
        num_words = max(1, len(ids) - int(is_mark.sum()))
        return Vectors(tuple(ids), vectors, is_mark, ids.count(self._tokenizer.unk_token_id) / num_words)

    def _is_mark(self, token: int) -> bool:
        return token in (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)

    def _tokens(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        ids: list[list[int]] = self._tokenizer(stripped, truncation=True, max_length=max_length)["input_ids"]
        return ids

    @torch.no_grad()
    def _run(self, texts: Sequence[str], max_length: int) -> Iterator[_Batch]:
        tokens = self._tokens(texts, max_length)
        for rows in _batches([len(ids) for ids in tokens], self._limits.batch_size):
            padded = self._tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
            is_last = self._layer == self._model.config.num_hidden_layers
            output = self._model(**padded.to(self._model.device), output_hidden_states=not is_last)
            last = output.last_hidden_state.float().cpu()
            layer = last if is_last else output.hidden_states[self._layer].float().cpu()
            yield _Batch(rows, padded["input_ids"].cpu(), padded["attention_mask"].cpu(), last, layer)


def _batches(sizes: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices by rising size, so that little is padding; at most so many and _MAX_BATCH_TOKENS with padding."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * sizes[i] > _MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
