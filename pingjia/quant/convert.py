"""A float network -> the same network with packed linears. Round to nearest; nothing is calibrated."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.quant.formats import FORMATS, PackedLinear
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


def count_weights(model: nn.Module) -> int:
    """Parameters of a network, a packed matrix counted by the weights it stands for; tied tensors once."""
    packed = {id(m.weight): m.num_weights for m in model.modules() if isinstance(m, PackedLinear)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())
