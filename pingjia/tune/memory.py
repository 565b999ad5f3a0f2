"""What a run will hold in memory, before it runs: arithmetic over the shape of the network and its longest batch.

Counts what autograd keeps of this package's packed forward pass, in elements per token: no padding, no T x T scores,
logits only a few rows at a time (`cross_entropy.py`), nothing below the first layer that learns. Not here: measuring,
and what to do when it does not fit (`relief.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.tune.cross_entropy import MAX_LOGITS_BYTES

_OWN_INPUT = {"o_proj", "dense", "down_proj", "dense_4h_to_h"}
"""Linears that no other one shares its input with."""

_GRADIENTS_AT_ONCE = 2
"""Gradients with respect to a layer's widest activation that exist together in the backward pass."""

_SCRATCH_BYTES = 48 * 2**20
"""Workspace of the matrix library, and what else has no name. Measured: 40 to 60 MB on two threads."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Elements that the parts of one layer keep per token for their backward pass, and other sizes.

    `norms`: inputs of the norms; `attention`: rotated queries and keys, values, output; `ffn`: what its activation
    keeps; `widest`: its widest activation. `sees_prompt_both_ways`: a mask is kept per row and layer.
    """

    num_layers: int
    hidden: int
    vocab: int
    norms: int
    attention: int
    ffn: int
    widest: int
    sees_prompt_both_ways: bool = False

    @classmethod
    def of(cls, config: Any) -> NetworkShape:
        if isinstance(config, ChatGLMConfig):
            h, inner = config.hidden_size, config.inner_hidden_size
            # v is a view of q, k and v together, so all of that stays; GELU keeps its input.
            return cls(config.num_layers, h, config.vocab_size, 2 * h, 3 * h + 3 * h, inner, inner, True)
        if isinstance(config, ChatGLM2Config):
            h, inner = config.hidden_size, config.ffn_hidden_size
            q, kv = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
            qkv = q + 2 * kv
            return cls(config.num_layers, h, config.padded_vocab_size, 2 * h, 2 * q + kv + qkv, 3 * inner, 2 * inner)
        return cls._of_llama_like(config)

    @classmethod
    def _of_llama_like(cls, config: Any) -> NetworkShape:
        h, inner, kind = config.hidden_size, config.intermediate_size, config.model_type
        head = getattr(config, "head_dim", None) or h // config.num_attention_heads
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        norms = 2 * h + (q + kv if kind == "qwen3" else 0) + (2 * h if kind == "glm4" else 0)
        return cls(config.num_hidden_layers, h, config.vocab_size, norms, 2 * q + 2 * kv, 3 * inner, inner)


@dataclass(frozen=True, slots=True)
class Adapters:
    """What is adapted: full module name -> elements of its input and its rank; `dropout`: whether it has any.

    `mask_bytes`: of dropout's mask, per element: 4 on a CPU, where it is a float, else 1. `fused`: computed the shorter
    way (`fused.py`), which keeps a byte for the mask and no copy. `recomputed`: inputs that are computed again instead.
    """

    inputs: Mapping[str, int]
    ranks: Mapping[str, int]
    dropout: bool
    mask_bytes: int
    fused: bool = False
    recomputed: frozenset[str] = frozenset()

    def bytes_per_token(self) -> int:
        """Of all layers together: the inputs of A (adapters of the same input share it, but for dropout), and of B.

        Adapters compute in float32.
        """
        if self.dropout and not self.fused:
            kept = sum(size * (4 + self.mask_bytes) for size in self.inputs.values())
        else:
            shared = {_input_of(name): size for name, size in self.inputs.items() if name not in self.recomputed}
            kept = 4 * sum(shared.values()) + (sum(self.inputs.values()) if self.dropout else 0)
        return kept + 4 * sum(self.ranks.values())


def _input_of(module: str) -> tuple[str, str]:
    parent, _, name = module.rpartition(".")
    return parent, name if name in _OWN_INPUT else ""


@dataclass(frozen=True, slots=True)
class Work:
    """The longest micro-batch, and how it is computed. `row_tokens`: of each of its rows."""

    row_tokens: tuple[int, ...]
    num_learnt: int
    num_learning_layers: int
    element_bytes: int  # 4 in float32, 2 in half precision
    checkpointing: bool

    @property
    def num_tokens(self) -> int:
        return sum(self.row_tokens)


@dataclass(frozen=True, slots=True)
class Held:
    """What is there before the first update, in bytes. `process`: Python, libraries, data; 0 on an accelerator."""

    weights: int
    adapters: int
    num_trainable: int
    process: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of a run at its peak, by what they are for. `num_tokens`: of the longest micro-batch."""

    num_tokens: int
    process: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    kept_states: int
    working: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "num_tokens")


_LOOSE_SHARE = 0.2
"""Freed blocks of less than a megabyte stay with the process, in pieces between those in use. Measured on SmolLM2 after
some updates: 190 to 290 MB beside 600 of activations (2 x 160 and 4 x 160 tokens)."""
_LOOSE_BYTES = 96 * 2**20


def plan_memory(shape: NetworkShape, adapters: Adapters, work: Work, held: Held, *, kept_states: int = 0) -> MemoryPlan:
    """The peak of an update on the longest micro-batch. kept_states: bytes of frozen layers' results (`frozen.py`)."""
    layer = _layer_bytes(shape, work)
    adapter = adapters.bytes_per_token() * work.num_tokens
    activations, working = layer * work.num_learning_layers + adapter, 0
    if work.checkpointing:
        activations = shape.hidden * work.num_tokens * work.element_bytes * work.num_learning_layers
        working = layer + adapter // max(1, work.num_learning_layers)
    activations += 4 * shape.hidden * work.num_tokens  # what enters the last norm
    working += _GRADIENTS_AT_ONCE * shape.widest * work.num_tokens * work.element_bytes
    return MemoryPlan(
        num_tokens=work.num_tokens,
        process=held.process,
        weights=held.weights,
        adapters=held.adapters,
        gradients=4 * held.num_trainable,
        optimizer=8 * held.num_trainable,
        activations=activations,
        logits=_logits_bytes(shape, work),
        kept_states=kept_states,
        working=working + _SCRATCH_BYTES + (_loose_bytes(activations) if held.process else 0),
    )


def _loose_bytes(activations: int) -> int:
    """What a CPU's allocator keeps of blocks that are free; an accelerator's gives them out again."""
    return int(_LOOSE_SHARE * activations) + _LOOSE_BYTES


def _layer_bytes(shape: NetworkShape, work: Work) -> int:
    """What one layer keeps, adapters apart. Norms compute in float32."""
    per_token = 4 * shape.norms + work.element_bytes * (shape.attention + shape.ffn)
    mask = sum(n * n for n in work.row_tokens) * (1 + work.element_bytes) if shape.sees_prompt_both_ways else 0
    return per_token * work.num_tokens + mask


def _logits_bytes(shape: NetworkShape, work: Work) -> int:
    """A block of float32 logits (and its copy in half precision), and the hidden states' gradient."""
    block = min(MAX_LOGITS_BYTES, 4 * shape.vocab * work.num_learnt)
    return block + (block // 2 if work.element_bytes == 2 else 0) + 4 * shape.hidden * work.num_learnt
