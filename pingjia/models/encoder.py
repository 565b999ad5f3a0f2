"""Texts -> vectors, by any BERT-like encoder in a directory. What BERTScore and grouping by meaning look at.

No remote code, no pickle: a directory must hold safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models.device import pick_device
from pingjia.models.loader import quiet
from pingjia.similarity import Vectors

_MAX_LENGTH = 512


def load_encoder(
    name: str | Path = "minilm", *, device: str = "cpu", layer: int | None = None, batch_size: int = 32
) -> Encoder:
    """An encoder by directory or packaged name. `layer`: whose hidden states are compared (1 the first; None the last).

    Raises ModelError for a directory without an encoder, its tokenizer or safetensors, and for a layer it has not.
    """
    directory = locate_model(name)
    if not directory.is_dir() or not any(directory.glob("*.safetensors")):
        raise ModelError(f"{name}: no encoder: a directory with config.json, a tokenizer and *.safetensors is needed")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = AutoModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
            )
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"{name}: cannot be loaded as an encoder: {str(e).splitlines()[0]}") from None
    if getattr(config, "is_decoder", False) or tokenizer.cls_token_id is None:
        raise ModelError(f"{name}: {config.model_type} is no encoder: BERTScore needs a BERT-like network with [CLS]")
    num_layers = int(config.num_hidden_layers)
    if layer is not None and not 1 <= layer <= num_layers:
        raise ModelError(f"{name}: layer {layer}: the encoder has layers 1-{num_layers}")
    return Encoder(model.to(pick_device(device)).eval(), tokenizer, layer or num_layers, batch_size)


class Encoder:
    """A `TextEncoder` (pingjia.similarity) over a transformers network. Longer texts are cut at 512 tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, batch_size: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._layer, self._batch_size = layer, batch_size
        longest = getattr(model.config, "max_position_embeddings", _MAX_LENGTH)
        self._max_length = min(_MAX_LENGTH, int(longest))
        self._marks = np.array([tokenizer.cls_token_id, tokenizer.sep_token_id])

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        """The hidden states of every token, of unit length, as the package bert-score takes them."""
        found: dict[int, Vectors] = {}
        for rows, ids_BT, mask_BT, hidden_BTH in self._run(texts):
            hidden_BTH = torch.nn.functional.normalize(hidden_BTH, dim=-1)
            for row, ids, mask, hidden in zip(rows, ids_BT, mask_BT, hidden_BTH, strict=True):
                size = int(mask.sum())
                numbers = ids[:size].numpy()
                is_mark = np.isin(numbers, self._marks)
                found[row] = Vectors(tuple(numbers.tolist()), hidden[:size].numpy(), is_mark)
        return [found[row] for row in range(len(texts))]

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The mean over the tokens of each text, of unit length: [N, H]."""
        result = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        for rows, _, mask_BT, hidden_BTH in self._run(texts):
            weight = mask_BT.unsqueeze(-1).float()
            mean = (hidden_BTH * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            result[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return result

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows, ids, mask, hidden states) per batch, texts of like length together: padding costs time."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [texts[i].strip() for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            output = self._model(**batch.to(self._model.device), output_hidden_states=True)
            hidden = output.hidden_states[self._layer]
            yield rows, batch["input_ids"].cpu(), batch["attention_mask"].cpu(), hidden.float().cpu()
