"""ChatGLM2-6B and ChatGLM3-6B (one network) for transformers. No remote code.

A causal decoder: RMSNorm before each part, SwiGLU, few key/value groups, rotary embeddings on the first half of each
head in interleaved pairs, a head of its own. Not here: configs (`chatglm_config.py`), reading published checkpoints
(`checkpoint.py`), tokenizers (`chat/chatglm.py`).

Shapes: B batch, T tokens, H heads, G key/value groups, D head size, F = D/4 rotary frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from pingjia.models.chatglm_config import ChatGLM2Config
from pingjia.models.eager import eager_attention
from pingjia.models.family import Family
from pingjia.quant.formats import PackedLinear, linear_class
from pingjia.quant.half import HalfLinear

FAMILY = Family(
    name="chatglm2",
    causal_prompt=True,
    lora_groups={
        "attention": ("query_key_value", "self_attention.dense"),
        "ffn": ("dense_h_to_4h", "dense_4h_to_h"),
        "embedding": ("word_embeddings",),
    },
    default_target=("query_key_value",),
)


def rotary_tables(config: ChatGLM2Config, position_ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, T, F]; as in the published code, not from the checkpoint's copy of the frequencies."""
    rotated = config.kv_channels // 2
    exponent = torch.arange(0, rotated, 2, device=position_ids_BT.device).float() / rotated
    frequencies_F = 1.0 / (10000 * config.rope_ratio) ** exponent
    angles = position_ids_BT[..., None].float() * frequencies_F
    return angles.cos(), angles.sin()


def rotate_pairs(x_BTHD: torch.Tensor, cos_BTF: torch.Tensor, sin_BTF: torch.Tensor) -> torch.Tensor:
    """Turn the first half of each head, columns 2i and 2i + 1 together; the second half stays."""
    turned, kept = x_BTHD.chunk(2, dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos_BTF[:, :, None].to(x_BTHD.dtype), sin_BTF[:, :, None].to(x_BTHD.dtype)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, kept), dim=-1)


class ChatGLM2Norm(nn.Module):
    """RMSNorm, its mean in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (x * torch.rsqrt(variance + self.eps))).to(x.dtype)


class ChatGLM2Attention(nn.Module):
    """The rows of `query_key_value`: all q heads, then all k groups, then all v groups."""

    is_causal = True

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        linear = linear_class(config.quantization_bit)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = config.kv_channels**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.split = [config.num_attention_heads, config.multi_query_group_num, config.multi_query_group_num]
        self.query_key_value = linear(config.hidden_size, sum(self.split) * self.head_dim, bias=config.add_qkv_bias)
        self.dense = linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).split(self.split, dim=-2)
        q, k = rotate_pairs(q, *tables), rotate_pairs(k, *tables)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.dense(out.flatten(-2)), weights


class ChatGLM2MLP(nn.Module):
    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        linear = linear_class(config.quantization_bit)
        self.dense_h_to_4h = linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class ChatGLM2Block(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = ChatGLM2Norm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = ChatGLM2Norm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLM2MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x), tables, attention_mask, past_key_values, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class _Embedding(nn.Module):
    """Holds the table under the published name `embedding.word_embeddings`."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class _Encoder(nn.Module):
    """Holds blocks and last norm under the published names `encoder.layers`, `encoder.final_layernorm`."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = ChatGLM2Norm(config.hidden_size, config.layernorm_epsilon)


class ChatGLM2PreTrainedModel(PreTrainedModel):
    config: ChatGLM2Config
    config_class = ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM2Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, PackedLinear):
            super()._init_weights(module)


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """The network. The head lies inside it, as in the published checkpoints, and is used by `ChatGLM2ForCausalLM`."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        config.check_network()
        self.embedding = _Embedding(config)
        self.encoder = _Encoder(config)
        self.output_layer = HalfLinear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; the embeddings may be stored in fewer bits."""
        return self.encoder.final_layernorm.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)  # the published code returns the last state before the last norm
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run sequences, or the next tokens of cached ones. attention_mask [B, S]: 1 = keep. position_ids [B, T]."""
        x = (self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds).to(self.dtype)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(x, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values
        )
        tables = rotary_tables(self.config, position_ids)
        for layer in self.encoder.layers:
            x = layer(x, tables, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(x), past_key_values=past_key_values
        )


def _positions(x: torch.Tensor, attention_mask: torch.Tensor | None, past: Cache | None) -> torch.Tensor:
    """int64 [B or 1, T]: tokens counted from 0, padding not counted."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
    start = 0 if past is None else int(past.get_seq_length())
    return torch.arange(start, start + x.shape[1], device=x.device)[None]


class ChatGLM2ForCausalLM(ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2-6B or ChatGLM3-6B, logits and loss."""

    _tied_weights_keys = {  # noqa: RUF012  (only with tie_word_embeddings; the published ones are not tied)
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def get_output_embeddings(self) -> HalfLinear:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: HalfLinear) -> None:
        self.transformer.output_layer = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `ChatGLM2Model.forward`. labels [B, T]: -100 = not a target; shifted inside; mean over the targets."""
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.transformer.output_layer(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.padded_vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoModel.register(ChatGLM2Config, ChatGLM2Model, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM2Config, ChatGLM2ForCausalLM, exist_ok=True)
