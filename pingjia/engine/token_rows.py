"""Rows of the embedding and the head that an adapter brings along: tokens whose rows were trained whole.

Every sequence of a mixed batch sees the rows of its own adapter; the base's table is not touched. Finding and reading
the adapter's files is in adapters.py.

Shapes: T tokens of the step, S slices of the step (one row of logits each), H hidden, V vocabulary, N new rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pingjia.engine.lora import AdapterRows, replace_module
from pingjia.errors import ModelError


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Row `row_NH[k]` stands for token `token_N[k]`. `place_V`: token -> k, -1 for all others."""

    token_N: torch.Tensor
    row_NH: torch.Tensor
    place_V: torch.Tensor

    @classmethod
    def of(cls, token_N: torch.Tensor, row_NH: torch.Tensor, num_tokens: int) -> TokenRows:
        place_V = torch.full((num_tokens,), -1, dtype=torch.int64, device=row_NH.device)
        place_V[token_N] = torch.arange(len(token_N), device=row_NH.device)
        return cls(token_N, row_NH, place_V)


class AdaptedTable(torch.nn.Module):
    """An embedding or a head with the rows of adapters beside it. `rows`: adapter key -> its rows."""

    def __init__(self, base: torch.nn.Module, adapter_rows: AdapterRows) -> None:
        super().__init__()
        self.base = base
        self.rows: dict[str, TokenRows] = {}
        self._adapter_rows = adapter_rows

    @property
    def weight(self) -> torch.Tensor:
        """The base's table: what a network asks its embedding for is the dtype and the device."""
        return table_of(self.base)


class AdaptedEmbedding(AdaptedTable):
    def forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        x_1TH: torch.Tensor = self.base(ids_1T)
        for key, index in self._adapter_rows.current.items():
            own = self.rows.get(key)
            if own is not None:
                place = own.place_V[ids_1T[:, index]]
                rows = own.row_NH[place.clamp(min=0)].to(x_1TH.dtype)
                x_1TH[:, index] = torch.where((place >= 0)[..., None], rows, x_1TH[:, index])
        return x_1TH


class AdaptedHead(AdaptedTable):
    def forward(self, x_1SH: torch.Tensor) -> torch.Tensor:
        logits_1SV: torch.Tensor = self.base(x_1SH)
        self.overwrite(x_1SH[0], logits_1SV[0])
        return logits_1SV

    def overwrite(self, x_SH: torch.Tensor, logits_SV: torch.Tensor) -> None:
        """Put the logits of every adapter's own tokens in the place of the base's, in place."""
        for key, index in self._adapter_rows.outputs.items():
            own = self.rows.get(key)
            if own is not None:
                logits_SN = x_SH[index].to(own.row_NH.dtype) @ own.row_NH.T
                logits_SV[index[:, None], own.token_N] = logits_SN.to(logits_SV.dtype)


def attach_rows(model: torch.nn.Module, key: str, rows: Mapping[str, TokenRows], adapter_rows: AdapterRows) -> None:
    """Put an adapter's rows beside the tables they belong to (module path -> rows)."""
    for path, own in rows.items():
        module = model.get_submodule(path)
        if not isinstance(module, AdaptedTable):
            kind = AdaptedEmbedding if isinstance(module, torch.nn.Embedding) else AdaptedHead
            module = kind(module, adapter_rows)
            replace_module(model, path, module)
        module.rows[key] = own


def detach_rows(model: torch.nn.Module, key: str) -> None:
    """Take an adapter's rows away again; a table that serves no adapter any more is unwrapped."""
    wrapped = [(path, m) for path, m in model.named_modules() if isinstance(m, AdaptedTable)]
    for path, module in wrapped:
        module.rows.pop(key, None)
        if not module.rows:
            replace_module(model, path, module.base)


def table_of(module: torch.nn.Module) -> torch.Tensor:
    """[V, H] of an embedding or a head."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bare(table: torch.nn.Module) -> torch.nn.Module:
    """An embedding or a head without what adapters have put beside it."""
    return table.base if isinstance(table, AdaptedTable) else table


# ---- what an adapter holds


def read_rows(
    path: Path, wanted: Any, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, TokenRows]:
    """The rows in an adapter's tensors (module path -> [N, H]) by module path, a tied head's among them.

    `wanted` is `trainable_token_indices` of its config. Raises ModelError when config, tensors and network do not fit
    together.
    """
    embedding, head = _table_paths(model)
    tokens = _tokens_by_table(path, wanted, embedding, head)
    own = dict(tensors)
    if model.config.tie_word_embeddings and embedding in own and head not in own:
        own[head], tokens[head] = own[embedding], tokens.get(embedding, [])
    if set(own) != set(tokens):
        odd = min(set(own) ^ set(tokens))
        raise ModelError(f"{path}: token rows of {odd} are missing in its file or in its config: it is incomplete")
    return {name: _checked(path, name, tokens[name], own[name], model) for name in sorted(own)}


def _table_paths(model: PreTrainedModel) -> tuple[str, str]:
    paths = {module: name for name, module in model.named_modules()}
    return paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]


def _tokens_by_table(path: Path, wanted: Any, embedding: str, head: str) -> dict[str, list[int]]:
    by_name = {embedding: wanted} if isinstance(wanted, list) else dict(wanted or {})
    found = {}
    for name, tokens in by_name.items():
        table = next((t for t in (embedding, head) if t == name or t.endswith(f".{name}")), None)
        if table is None:
            raise ModelError(
                f"{path}: trainable_token_indices names {name!r}, which is neither the embedding nor the head of this "
                "network: another base, or merge it first"
            )
        found[table] = list(tokens)
    return found


def _checked(path: Path, name: str, tokens: list[int], row_NH: torch.Tensor, model: PreTrainedModel) -> TokenRows:
    table_VH = table_of(bare(model.get_submodule(name)))
    num_tokens = table_VH.shape[0]
    if len(set(tokens)) < len(tokens) or min(tokens, default=0) < 0 or max(tokens, default=0) >= num_tokens:
        raise ModelError(
            f"{path}: trainable_token_indices must be different ids from 0 to {num_tokens - 1}: another base?"
        )
    if tuple(row_NH.shape) != (len(tokens), table_VH.shape[1]):
        raise ModelError(
            f"{path}: token rows of {name} have shape {tuple(row_NH.shape)}, not {(len(tokens), table_VH.shape[1])}: "
            "another base?"
        )
    row_NH = row_NH.to(model.device)
    return TokenRows.of(torch.tensor(tokens, device=row_NH.device), row_NH, num_tokens)
