"""A directory of an encoder-decoder translation model (MarianMT, M2M100, NLLB, mBART) -> texts translated by it.

No remote code, no downloads. Not here: what a translation must keep (`data/back_translation.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from pingjia.errors import ModelError, PingjiaError
from pingjia.locate import locate_model
from pingjia.models.device import pick_device
from pingjia.models.loader import quiet, read_config

ONE_PAIR = frozenset({"marian", "fsmt", "bart", "encoder-decoder"})  # made for one pair of languages
MULTILINGUAL = frozenset({"m2m_100", "mbart"})  # told by codes what to translate into


class SeqTranslator:
    """Translates by beam search. A text that does not fit the model, or whose translation has no end, is an error."""

    def __init__(
        self, model: Any, tokenizer: Any, *, first_token: int | None = None, batch_size: int = 16, num_beams: int = 4
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._first_token = first_token
        self._batch_size = batch_size
        self._num_beams = num_beams
        self.max_tokens = _max_tokens(model, tokenizer)

    def translate(self, texts: Sequence[str]) -> list[str | PingjiaError]:
        """One translation per text, in order, or why there is none."""
        lengths = [len(self._tokenizer(text).input_ids) for text in texts]
        done: dict[int, str | PingjiaError] = {
            i: ModelError(f"{n} tokens, and the translation model takes {self.max_tokens}")
            for i, n in enumerate(lengths)
            if n > self.max_tokens
        }
        # Texts of like length together: less padding.
        left = sorted((i for i in range(len(texts)) if i not in done), key=lambda i: lengths[i])
        for at in range(0, len(left), self._batch_size):
            batch = left[at : at + self._batch_size]
            done.update(zip(batch, self._batch([texts[i] for i in batch]), strict=True))
        return [done[i] for i in range(len(texts))]

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> list[str | PingjiaError]:
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._model.device)
        max_new = min(self.max_tokens - 1, 2 * inputs["input_ids"].shape[1] + 32)
        options = {} if self._first_token is None else {"forced_bos_token_id": self._first_token}
        ids_BT = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new,
            num_beams=self._num_beams,
            do_sample=False,
            **options,
        )
        return [self._text(ids_T.tolist()[1:], max_new) for ids_T in ids_BT]

    def _text(self, new_ids: list[int], max_new: int) -> str | PingjiaError:
        # Many configurations force an end at the limit, so the place of the end tells, not its presence.
        ends = self._model.config.eos_token_id
        num = next((i + 1 for i, token in enumerate(new_ids) if token == ends), len(new_ids))
        if num >= max_new:
            return ModelError(f"the translation did not end within {max_new} tokens")
        return str(self._tokenizer.decode(new_ids, skip_special_tokens=True)).strip()


def load_translator(
    directory: str | Path,
    source: str = "zh",
    target: str = "en",
    *,
    device: str = "auto",
    batch_size: int = 16,
    num_beams: int = 4,
) -> SeqTranslator:
    """Open a translation model. `source` and `target` matter to multilingual models only, in the model's own codes.

    Raises ModelError for a directory that is no encoder-decoder, or of a kind that needs other instructions.
    """
    path = locate_model(directory)
    kind = str(read_config(path).get("model_type")) if path.is_dir() else path.suffix
    if kind not in ONE_PAIR | MULTILINGUAL:
        known = ", ".join(sorted(ONE_PAIR | MULTILINGUAL))
        raise ModelError(f"{path}: {kind} is no translation model that can be used here ({known}); or use an endpoint")
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sacremoses is only recommended
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model = AutoModelForSeq2SeqLM.from_pretrained(
                path, config=config, local_files_only=True, dtype=torch.float32
            )
    except (OSError, ValueError, TypeError, ImportError, KeyError, RuntimeError) as e:
        raise ModelError(f"{path}: cannot be loaded as a translation model: {str(e).splitlines()[0]}") from None
    first = _first_token(tokenizer, path, source, target) if kind in MULTILINGUAL else None
    model.to(pick_device(device)).eval()
    return SeqTranslator(model, tokenizer, first_token=first, batch_size=batch_size, num_beams=num_beams)


def _first_token(tokenizer: Any, path: Path, source: str, target: str) -> int:
    """Set the language to translate from; the id of the token that says into which."""
    ids = {code: _code_id(tokenizer, code) for code in (source, target)}
    missing = [code for code, token in ids.items() if token is None]
    if missing:
        raise ModelError(f"{path}: has no language {missing[0]!r}; give its own code, such as zh, zho_Hans or zh_CN")
    tokenizer.src_lang = source
    first = ids[target]
    assert first is not None
    return first


def _code_id(tokenizer: Any, code: str) -> int | None:
    """M2M100 writes __zh__, NLLB zho_Hans, mBART zh_CN."""
    ids = (tokenizer.convert_tokens_to_ids(form) for form in (code, f"__{code}__"))
    return next((i for i in ids if i is not None and i != tokenizer.unk_token_id), None)


def _max_tokens(model: Any, tokenizer: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    return int(min(limit, tokenizer.model_max_length))
