"""A float network -> the same network with packed linears. Round to nearest; nothing is calibrated."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.quant.bnb import is_packed_by_bnb
from pingjia.quant.formats import FORMATS, PackedEmbedding, PackedLinear
from pingjia.quant.rows import BITS


def quantize_model(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Pack every linear of the model in place, one at a time, and return it. Embeddings and head keep their floats.

    `config.quantization_bit` records it, as published ChatGLM checkpoints do. Raises ModelError for other widths, an
    already packed model, or (INT4) an odd number of columns.
    """
    if bits not in BITS:
        raise ModelError(f"bits={bits}: choose 4 or 8")
    found = next((m for m in model.modules() if isinstance(m, PackedLinear)), None)
    if found is not None:
        raise ModelError(f"the model is already packed to {found.bits} bits; load the float checkpoint to pack it anew")
    names = packable(model)
    _check_columns(model, names, bits)
    for name in names:
        _replace(model, name, bits)
    model.config.quantization_bit = bits
    return model


def packable(model: PreTrainedModel) -> list[str]:
    """Names of the linears that get packed: all but the head."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _check_columns(model: nn.Module, names: list[str], bits: int) -> None:
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        columns = linear.in_features
        if bits == 4 and columns % 2:
            raise ModelError(f"{name}: INT4 packs columns in pairs and it has {columns}; use bits=8")


def _replace(model: nn.Module, name: str, bits: int) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, FORMATS[f"int{bits}"].of(linear))


def pack_tables(model: PreTrainedModel, weight_NP: torch.Tensor, scale_N: torch.Tensor, bits: int) -> None:
    """Give a network whose head is its embedding table one packed table for both, as "-qe" checkpoints store it.

    weight_NP int8 [vocabulary, stored columns], scale_N float [vocabulary].
    """
    embedding = PackedEmbedding(weight_NP, scale_N, bits)
    head = FORMATS[f"int{bits}"](embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    # The scales are the table's: stored once, under its name.
    head.register_buffer("weight_scale", embedding.weight_scale, persistent=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    model.config.quantization_embeddings = True


def count_weights(model: nn.Module) -> int:
    """Parameters of a network, a packed matrix counted by the weights it stands for; tied tensors once."""
    kinds = (PackedLinear, PackedEmbedding)
    packed = {id(m.weight): m.num_weights for m in model.modules() if isinstance(m, kinds)}
    bnb = [m for m in model.modules() if isinstance(m, nn.Linear) and is_packed_by_bnb(m)]
    packed |= {id(m.weight): m.in_features * m.out_features for m in bnb}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())
