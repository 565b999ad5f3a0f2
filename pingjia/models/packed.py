"""Directories that `pingjia quantize` wrote -> networks, every tensor checked against its checksum.

Not here: writing them (`compress.py`, `export/quantize.py`), published ChatGLM checkpoints (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.models.checkpoint import shard_files, survey
from pingjia.models.device import pick_dtype
from pingjia.models.skeleton import empty_network, fill, is_tied, place_packed, table_names, tensor_names, tie_tables
from pingjia.models.source import Source, read_any_config
from pingjia.quant.bnb import BnbFormat
from pingjia.quant.formats import PackedEmbedding
from pingjia.quant.settings import QUANT_METHOD
from pingjia.quant.shards import read_digests, require_digest


def is_packed_directory(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a directory that `pingjia quantize` wrote."""
    packed = raw_config.get("quantization_config")
    return isinstance(packed, dict) and packed.get("quant_method") == QUANT_METHOD


class PackedSource(Source):
    """The tensors of such a directory; each is checked when it is read."""

    def __init__(self, directory: Path, raw_config: dict[str, Any]) -> None:
        self.directory = directory
        self._digests = read_digests(directory)
        stored = survey(shard_files(directory))
        super().__init__(str(directory), read_any_config(directory, raw_config), raw_config, stored)
        odd = sorted(set(stored) ^ set(self._digests))
        if odd:
            raise ModelError(f"{directory}: {len(odd)} tensors are not those of its index, for example {odd[0]}")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """As `Source.read`; ModelError naming a tensor whose bytes have changed."""
        found = super().read(names)
        for name, tensor in found.items():
            require_digest(self.directory, name, tensor, self._digests[name])
        return found

    def network(self) -> PreTrainedModel:
        """The network with packed modules in their places, nothing in memory yet. ModelError for what does not fit."""
        model = empty_network(self.config)
        place_packed(model, self.shapes)
        _, head = table_names(model)
        optional = {n for n in tensor_names(model, head)} if is_tied(model) else set()
        self.require(tensor_names(model), optional)
        return model


def load_packed(
    directory: Path,
    raw_config: dict[str, Any],
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    bits: int | BnbFormat | None,
) -> PreTrainedModel:
    """Load such a directory, eval mode. `bits` may repeat what is stored, nothing else.

    Norms and biases become `dtype` ("auto": float32 on a CPU); packed matrices stay as they are. On a GPU products run
    in plain torch, widened block by block.
    """
    stored_bits = _stored_bits(directory, raw_config)
    if bits not in (None, stored_bits):
        wanted = "packed by bitsandbytes" if isinstance(bits, BnbFormat) else f"{bits} bits"
        raise ModelError(f"{directory}: stored in {stored_bits} bits; it cannot become {wanted}: use the original")
    source = PackedSource(directory, raw_config)
    model = source.network()
    computed = pick_dtype(dtype, device, getattr(source.config, "dtype", None))
    _fill_all(model, source, computed)
    model.config.quantization_bit = stored_bits
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.to(device).eval()


def _stored_bits(directory: Path, raw_config: Mapping[str, Any]) -> int:
    packed = raw_config["quantization_config"]
    if packed.get("version") != 1 or packed.get("bits") not in (4, 8):
        raise ModelError(
            f"{directory}: quantization_config says version {packed.get('version')!r}, bits {packed.get('bits')!r}; "
            "this release reads version 1 with 4 or 8 bits: quantise again, or update pingjia"
        )
    return int(packed["bits"])


def _fill_all(model: PreTrainedModel, source: PackedSource, dtype: torch.dtype) -> None:
    keep = _tables_kept_half(model, dtype)
    for names in _lots(source):
        fill(model, source.read(names), dtype, keep)
    if is_tied(model):
        tie_tables(model)
    table = model.get_input_embeddings()
    if isinstance(table, PackedEmbedding):
        table.out_dtype = dtype


def _lots(source: PackedSource) -> Iterable[list[str]]:
    """Names by the module that is nearest to the root and not the root: one block, or one table, at a time."""
    lots: dict[str, list[str]] = {}
    for name in source.shapes:
        lots.setdefault(name.rpartition(".")[0], []).append(name)
    return lots.values()


def _tables_kept_half(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Tables stored in half precision stay so where the network widens the rows it picks (ChatGLM), on a CPU."""
    widens = isinstance(model.config, (ChatGLMConfig, ChatGLM2Config)) and dtype == torch.float32
    return [f"{path}.weight" for path in table_names(model)] if widens else []
