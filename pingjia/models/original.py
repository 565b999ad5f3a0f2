"""The float original of a name, to be read tensor by tensor.

A directory is read from its files and never loaded as a whole. A GGUF file is loaded: transformers reads it only so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models.checkpoint import shard_files, survey
from pingjia.models.loader import load_model, read_config
from pingjia.models.registry import require_supported
from pingjia.models.source import Source, read_any_config


def open_original(name: str | Path) -> Source:
    """The model of that name. Raises ModelError for one that is packed already, unsupported or broken."""
    location = locate_model(name)
    if location.is_file():
        model = load_model(location)
        raw = model.config.to_dict()
        return Source(str(name), model.config, raw, _own_tensors(model))
    raw = read_config(location)
    require_supported(raw["model_type"])
    _require_floats(location, raw)
    stored = survey(shard_files(location))
    return Source(str(name), read_any_config(location, raw), raw, stored)


def _require_floats(location: Path, raw: Mapping[str, Any]) -> None:
    found = raw.get("quantization_config") or raw.get("quantization_bit")
    if found:
        bits = found.get("bits", "few") if isinstance(found, dict) else found
        raise ModelError(f"{location}: its weights are packed to {bits} bits already; give the float checkpoint")


def _own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A tied table once, under the embedding's name."""
    tensors = {n: t.detach() for n, t in model.named_parameters()}
    return tensors | {n: t for n, t in model.state_dict().items() if n not in tensors and not _is_tied(t, tensors)}


def _is_tied(tensor: torch.Tensor, others: Mapping[str, torch.Tensor]) -> bool:
    return any(tensor.data_ptr() == t.data_ptr() for t in others.values())
