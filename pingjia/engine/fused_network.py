"""A network's modules -> what the compiled forward pass must know of it, or the reason why it cannot run it.

Every module is checked: a class, a child or a setting that is not known here makes `describe` refuse, and the engine
then computes in torch. Pointers and memory are in fused.py.

Shapes: P positions, F rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pingjia.engine import fused_abi as abi
from pingjia.engine.lora import AdaptedLinear
from pingjia.engine.token_rows import bare
from pingjia.models import chatglm, chatglm2
from pingjia.quant.formats import PackedLinear

# Blocks of transformers whose forward is: x += attention(norm(x)); x += mlp(norm(x)).
_BLOCKS = {"Llama", "Mistral", "Qwen2", "Qwen3", "Glm"}
_ROPE_PAIRS = {"Glm"}
_RMS_NORMS = {f"{name}RMSNorm" for name in _BLOCKS} | {"ChatGLM2Norm"}
# Rotations whose frequencies depend on how long the sequence is have no table.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
_MAX_HEAD_DIM, _MAX_GROUP = 512, 256


class CannotFuseError(Exception):
    """Why the compiled pass does not run this network."""


@dataclass(frozen=True, slots=True)
class Block:
    """Module paths of a block's linears, in the order their outputs lie side by side, and its norms."""

    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    attention_norm: nn.Module
    mlp_norm: nn.Module
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Rotation:
    """Which columns of a head turn together, and by how much at each position."""

    kind: int
    cos_PF: torch.Tensor
    sin_PF: torch.Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of attention. `interleaved`: a row of qkv is q, k, v of head 0, then of head 1, ...; else all q, k, v."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool
    scaling: float


@dataclass(frozen=True, slots=True)
class Description:
    """A network. `residual`: None keeps the unnormed input beside each part, a number the normed one times that."""

    heads: Heads
    rotation: Rotation
    activation: int
    residual: float | None
    blocks: tuple[Block, ...]
    last_norm: nn.Module


def describe(model: PreTrainedModel, num_positions: int) -> Description:
    """What the compiled pass must know of `model` for sequences of up to `num_positions` tokens.

    Raises CannotFuseError with the reason.
    """
    if isinstance(model, chatglm.ChatGLMForCausalLM):
        found = _chatglm(model, num_positions)
    elif isinstance(model, chatglm2.ChatGLM2ForCausalLM):
        found = _chatglm2(model, num_positions)
    else:
        found = _llama_like(model, num_positions)
    _check(model, found)
    return found


# ---- checks


def linear_of(model: nn.Module, path: str) -> PackedLinear:
    """The packed linear at `path`, without adapters."""
    module = model.get_submodule(path)
    module = module.base if isinstance(module, AdaptedLinear) else module
    if not isinstance(module, PackedLinear):
        raise CannotFuseError(f"{path} is not packed (bits 4 or 8)")
    return module


def _check(model: PreTrainedModel, found: Description) -> None:
    heads = found.heads
    for block in found.blocks:
        for path in (*block.qkv, block.out, *block.up, block.down):
            linear_of(model, path)
        for norm in (block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm, found.last_norm):
            _check_norm(norm)
    if heads.num_heads % heads.num_kv_heads or heads.head_dim > _MAX_HEAD_DIM:
        raise CannotFuseError(f"{heads.num_heads} heads of {heads.head_dim} over {heads.num_kv_heads} of keys")
    if heads.num_heads // heads.num_kv_heads > _MAX_GROUP:
        raise CannotFuseError(f"more than {_MAX_GROUP} heads share a head of keys")
    hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise CannotFuseError(f"{hooked[0] or 'the network'} has forward hooks")
    if not isinstance(bare(model.get_output_embeddings()), nn.Linear):
        raise CannotFuseError("the head is no linear")


def _check_norm(norm: nn.Module | None) -> None:
    known = norm is None or type(norm).__name__ in _RMS_NORMS or type(norm) is nn.LayerNorm
    if not known:
        raise CannotFuseError(f"unknown norm {type(norm).__name__}")


def _only_children(module: nn.Module, path: str, required: set[str], optional: set[str] | None = None) -> None:
    names = {name for name, _ in module.named_children()}
    odd = (names ^ required) - (optional or set())
    if odd:
        raise CannotFuseError(f"{path} ({type(module).__name__}) has other parts than expected: {min(odd)}")


# ---- families


def _llama_like(model: PreTrainedModel, num_positions: int) -> Description:
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in _BLOCKS or not type(model).__module__.startswith("transformers.models."):
        raise CannotFuseError(f"no compiled form of {type(model).__name__}")
    core: Any = model.get_submodule("model")
    _only_children(core, "model", {"embed_tokens", "layers", "norm", "rotary_emb"})
    blocks = tuple(_llama_block(family, layer, f"model.layers.{i}") for i, layer in enumerate(core.layers))
    attention = core.layers[0].self_attn
    keys, queries = (getattr(attention, f"{n}_proj").out_features // attention.head_dim for n in "kq")
    heads = Heads(queries, keys, attention.head_dim, False, float(attention.scaling))
    return Description(heads, _llama_rotation(family, core, num_positions), abi.SWIGLU, None, blocks, core.norm)


def _llama_block(family: str, layer: Any, path: str) -> Block:
    if type(layer).__name__ != f"{family}DecoderLayer":
        raise CannotFuseError(f"no compiled form of {type(layer).__name__}")
    _only_children(layer, path, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention, mlp = layer.self_attn, layer.mlp
    _only_children(
        attention, f"{path}.self_attn", {"q_proj", "k_proj", "v_proj", "o_proj"},
        {"q_norm", "k_norm"} if family == "Qwen3" else None,
    )  # fmt: skip
    act = "activation_fn" if family == "Glm" else "act_fn"
    up = ("gate_up_proj",) if family == "Glm" else ("gate_proj", "up_proj")
    _only_children(mlp, f"{path}.mlp", {*up, "down_proj", act})
    if type(getattr(mlp, act)).__name__ not in ("SiLU", "SiLUActivation"):
        raise CannotFuseError(f"{path}.mlp: activation {type(getattr(mlp, act)).__name__}, not SiLU")
    return Block(
        qkv=tuple(f"{path}.self_attn.{n}_proj" for n in "qkv"),
        out=f"{path}.self_attn.o_proj",
        up=tuple(f"{path}.mlp.{name}" for name in up),
        down=f"{path}.mlp.down_proj",
        attention_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
    )


@torch.inference_mode()
def _llama_rotation(family: str, core: Any, num_positions: int) -> Rotation:
    """The tables as the network's own module makes them, scaling included."""
    rotary = core.rotary_emb
    if rotary.rope_type not in _ROPE_TYPES:
        raise CannotFuseError(f"rotation of type {rotary.rope_type!r} changes with the length of the sequence")
    cos, sin = rotary(torch.zeros((), dtype=torch.float32), torch.arange(num_positions)[None])
    half = cos.shape[-1] // 2
    kind = abi.ROPE_PAIRS if family in _ROPE_PAIRS else abi.ROPE_HALVES
    return Rotation(kind, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def _chatglm(model: chatglm.ChatGLMForCausalLM, num_positions: int) -> Description:
    core, config = model.transformer, model.config
    both_B2T = torch.arange(num_positions).expand(1, 2, -1)
    cos, sin = (table[0, :, 0].contiguous() for table in chatglm.rotary_tables(config, both_B2T))
    blocks = []
    for i, layer in enumerate(core.layers):
        path = f"transformer.layers.{i}"
        _only_children(layer, path, {"input_layernorm", "attention", "post_attention_layernorm", "mlp"})
        blocks.append(_glm_block(layer, path, "attention"))
    heads = Heads(config.num_attention_heads, config.num_attention_heads, config.head_dim, True, config.head_dim**-0.5)
    rotation = Rotation(abi.ROPE_TWO_HALVES, cos, sin)
    return Description(heads, rotation, abi.GELU_TANH, chatglm.ALPHA, tuple(blocks), core.final_layernorm)


def _chatglm2(model: chatglm2.ChatGLM2ForCausalLM, num_positions: int) -> Description:
    core, config = model.transformer.encoder, model.config
    cos, sin = (table[0].contiguous() for table in chatglm2.rotary_tables(config, torch.arange(num_positions)[None]))
    blocks = []
    for i, layer in enumerate(core.layers):
        path = f"transformer.encoder.layers.{i}"
        _only_children(layer, path, {"input_layernorm", "self_attention", "post_attention_layernorm", "mlp"})
        blocks.append(_glm_block(layer, path, "self_attention"))
    heads = Heads(
        config.num_attention_heads, config.multi_query_group_num, config.kv_channels, False, config.kv_channels**-0.5
    )
    rotation = Rotation(abi.ROPE_PAIRS, cos, sin)
    return Description(heads, rotation, abi.SWIGLU, None, tuple(blocks), core.final_layernorm)


def _glm_block(layer: Any, path: str, attention: str) -> Block:
    _only_children(getattr(layer, attention), f"{path}.{attention}", {"query_key_value", "dense"})
    _only_children(layer.mlp, f"{path}.mlp", {"dense_h_to_4h", "dense_4h_to_h"})
    return Block(
        qkv=(f"{path}.{attention}.query_key_value",),
        out=f"{path}.{attention}.dense",
        up=(f"{path}.mlp.dense_h_to_4h",),
        down=f"{path}.mlp.dense_4h_to_h",
        attention_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
    )
