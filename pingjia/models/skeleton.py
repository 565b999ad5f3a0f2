"""A network without weights, into which they are put piece by piece and taken out again.

Parameters lie on torch's "meta" device (no memory) until `fill`; the few buffers a network computes for itself (rotary
frequencies) are real. Not here: where tensors come from (`source.py`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pingjia.errors import ModelError
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.quant.formats import Int4Linear, Int8Linear, PackedEmbedding, PackedLinear
from pingjia.quant.group import GroupEmbedding, GroupInt4Linear, GroupInt8Linear
from pingjia.quant.half import HalfLinear


def empty_network(config: Any) -> PreTrainedModel:
    """The float network of a config, no weight in memory, eval mode."""
    own = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with init_empty_weights(include_buffers=False):
        if isinstance(own, ChatGLMConfig):
            model: PreTrainedModel = ChatGLMForCausalLM(own)
        elif isinstance(own, ChatGLM2Config):
            model = ChatGLM2ForCausalLM(own)
        else:
            model = AutoModelForCausalLM.from_config(own)
    _widen_head(model)
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def _widen_head(model: PreTrainedModel) -> None:
    """A head that may stay in half precision: its table is the largest tensor of all."""
    head = model.get_output_embeddings()
    if not isinstance(head, HalfLinear):
        half = HalfLinear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        model.set_output_embeddings(half)


def block_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the blocks in the order they run."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
    ]
    assert len(lists) == 1, [path for path, _ in lists]
    path, blocks = lists[0]
    return [f"{path}.{i}" for i in range(len(blocks))]


def table_names(model: PreTrainedModel) -> tuple[str, str]:
    """Paths of the embedding and of the head."""
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    return paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one table."""
    return bool(model.config.tie_word_embeddings)


def tensor_names(model: PreTrainedModel, path: str = "") -> list[str]:
    """Names of the parameters under a module (a tied head's too), and of a packed one's scales."""
    module = model.get_submodule(path)
    buffers = [n for n, _ in module.named_buffers() if n.endswith("weight_scale")]
    names = [*(n for n, _ in module.named_parameters(remove_duplicate=False)), *buffers]
    return [f"{path}.{n}" if path else n for n in names]


def fill(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    keep: Iterable[str] = (),
) -> None:
    """Put tensors into their places. Floats become `dtype`, but for those named in `keep` and for scales."""
    keep = set(keep)
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        wanted = getattr(module, kind)
        if wanted.shape != tensor.shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)} instead of {list(wanted.shape)}")
        if kind in module._buffers:
            setattr(module, kind, tensor)
        else:
            value = tensor.to(dtype) if tensor.is_floating_point() and name not in keep else tensor
            setattr(module, kind, nn.Parameter(value, requires_grad=False))


def free(model: PreTrainedModel, path: str) -> None:
    """Give the memory of a module's parameters and scales back."""
    for name in tensor_names(model, path):
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        value = getattr(module, kind)
        empty = torch.empty_like(value, device="meta")
        setattr(module, kind, empty if kind in module._buffers else nn.Parameter(empty, requires_grad=False))
    trim_heap()


def trim_heap() -> None:
    """Hand freed memory back to the system. glibc keeps pieces under 32 MB for later, more with every block, and the
    peak would grow with the number of blocks (14 % from 4 to 16 of width 512)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's; other C libraries have none
        trim(0)


# ---- packed modules


def place_packed(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Exchange every linear and table whose stored tensors are packed. `shapes`: name -> shape, of all that is stored.

    What a matrix is packed to, its shapes say: a byte per column is INT8, half of one INT4; a scale per group is our
    own layout, one per row the published one.
    """
    embedding, head = table_names(model)
    for path, module in list(model.named_modules()):
        if f"{path}.weight_scale" in shapes and path not in (embedding, head):
            assert isinstance(module, nn.Linear)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _empty_packed(module, path, shapes))
    if f"{embedding}.weight_scale" in shapes:
        model.set_input_embeddings(_empty_table(model.get_input_embeddings(), embedding, shapes))
    source = embedding if is_tied(model) else head
    if f"{source}.weight_scale" in shapes:
        model.set_output_embeddings(_empty_packed(model.get_output_embeddings(), source, shapes))


def _empty_packed(linear: nn.Linear, path: str, shapes: Mapping[str, tuple[int, ...]]) -> PackedLinear:
    size = linear.in_features, linear.out_features, linear.bias is not None
    scale_shape = shapes[f"{path}.weight_scale"]
    is_int8 = shapes.get(f"{path}.weight", ())[1:] == (linear.in_features,)
    if len(scale_shape) == 2:
        grouped = GroupInt8Linear if is_int8 else GroupInt4Linear
        return grouped(*size, device="meta", group_size=linear.in_features // scale_shape[1])
    return (Int8Linear if is_int8 else Int4Linear)(*size, device="meta")


def _empty_table(table: nn.Embedding, path: str, shapes: Mapping[str, tuple[int, ...]]) -> nn.Embedding:
    shape, scale_shape = shapes[f"{path}.weight"], shapes[f"{path}.weight_scale"]
    if len(scale_shape) == 1:
        weight = torch.empty(shape, dtype=torch.int8, device="meta")
        return PackedEmbedding(weight, torch.empty(scale_shape, device="meta"), 8)
    weight = torch.empty(shape, dtype=torch.int8 if shape[1] == table.embedding_dim else torch.uint8, device="meta")
    return GroupEmbedding(weight, torch.empty(scale_shape, dtype=torch.float16, device="meta"))


def tie_tables(model: PreTrainedModel) -> None:
    """Make a tied head use the embedding's tensors; scales belong to the embedding and are saved under its name."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = table.weight
    if isinstance(head, PackedLinear):
        head.register_buffer("weight_scale", table.weight_scale, persistent=False)
