"""ChatGLM-6B, the original (GLM, arXiv:2103.10360), as a transformers network. No remote code.

Here: its positions, its mask, its block, its head. Not here: configs (`chatglm_config.py`), reading published
checkpoints (`checkpoint.py`), the tokenizer (`chat/chatglm.py`).

What is unusual, all of it from the published code:
- The prompt, everything before the first `<sop>`, sees itself both ways; from `<sop>` on attention is causal.
- Two rows of positions turn one half of every head each: row 0 counts the prompt and then stays at the mask token
  ([gMASK], else [MASK]); row 1 is 0 in the prompt and counts 1, 2, 3, ... from `<sop>`.
- The residual is the *normed* input times sqrt(2 * 28), whatever the depth.

Shapes: B batch, T tokens, H heads, D head size, F = D/4 rotary frequencies, S keys (past and present).
"""

from __future__ import annotations

from collections.abc import Sequence
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

from pingjia.errors import ModelError
from pingjia.models.attention import IMPLEMENTATION
from pingjia.models.chatglm_config import ChatGLMConfig
from pingjia.models.eager import eager_attention
from pingjia.models.family import Family
from pingjia.quant.formats import PackedLinear, linear_class
from pingjia.quant.half import HalfLinear

# The published block computes sqrt(2 * num_layers) but is never given the real number of layers: 28 is its default.
ALPHA = (2 * 28) ** 0.5


# ---- positions


def prompt_layout(config: ChatGLMConfig, ids: Sequence[int]) -> tuple[int, int]:
    """(index of the mask token, number of tokens before the first `<sop>`) of one sequence.

    [gMASK] wins over [MASK] when both are there, as in the published model (its tokenizer prefers [MASK] when it pads;
    its chat never pads). Raises ModelError when the sequence has no `<sop>` or no mask token.
    """
    mask_id = config.gmask_token_id if config.gmask_token_id in ids else config.mask_token_id
    if config.bos_token_id not in ids or mask_id not in ids:
        raise ModelError(
            f"a ChatGLM-6B prompt must hold [gMASK] ({config.gmask_token_id}) or [MASK] ({config.mask_token_id}) and "
            f"then <sop> ({config.bos_token_id}); none in these {len(ids)} tokens: render prompts with the tokenizer"
        )
    return ids.index(mask_id), ids.index(config.bos_token_id)


def glm_positions(config: ChatGLMConfig, ids: Sequence[int], start: int, stop: int) -> torch.Tensor:
    """int64 [2, stop - start]: both rows of positions of tokens start..stop-1 of the whole sequence `ids`."""
    mask_index, prompt_len = prompt_layout(config, ids)
    index = torch.arange(start, stop)
    in_answer = index >= prompt_len
    return torch.stack((index.masked_fill(in_answer, mask_index), (index - prompt_len + 1).clamp(min=0)))


def glm_prefix_len(config: ChatGLMConfig, ids: Sequence[int]) -> int:
    """How many leading tokens see each other both ways."""
    return prompt_layout(config, ids)[1]


def batch_positions(
    config: ChatGLMConfig, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None
) -> torch.Tensor:
    """int64 [B, 2, T] of whole sequences; padding (mask 0) does not count and gets 0."""
    positions = input_ids_BT.new_zeros(input_ids_BT.shape[0], 2, input_ids_BT.shape[1])
    for b, row in enumerate(input_ids_BT):
        real = torch.ones_like(row, dtype=torch.bool) if attention_mask_BT is None else attention_mask_BT[b].bool()
        ids = row[real].tolist()
        positions[b, :, real] = glm_positions(config, ids, 0, len(ids)).to(positions.device)
    return positions


FAMILY = Family(
    name="chatglm",
    causal_prompt=False,
    lora_groups={
        "attention": ("query_key_value", "attention.dense"),
        "ffn": ("dense_h_to_4h", "dense_4h_to_h"),
        "embedding": ("word_embeddings",),
    },
    default_target=("query_key_value",),
    positions=glm_positions,
    prefix_len=glm_prefix_len,
)


# ---- rotation


def rotary_tables(config: ChatGLMConfig, position_ids_B2T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, T, 2, F].

    The frequencies are rounded to fp16, as the published code rounds them at construction, and kept so in every number
    format; it makes a difference of 0.02 in the logits of a 700-token prompt.
    """
    half = config.head_dim // 2
    exponent = torch.arange(0, half, 2, device=position_ids_B2T.device).float() / half
    frequencies_F = (1.0 / 10000**exponent).half().float()
    angles = position_ids_B2T.transpose(1, 2)[..., None].float() * frequencies_F
    return angles.cos(), angles.sin()


def rotate_2d(x_BTHD: torch.Tensor, cos_BT2F: torch.Tensor, sin_BT2F: torch.Tensor) -> torch.Tensor:
    """Turn the first half of each head by position row 0 and the second half by row 1.

    Inside a half, the first quarter of the head pairs with the second. Equals the published code to 1e-6 in fp32.
    """
    quarters = x_BTHD.unflatten(-1, (2, 2, -1))
    first, second = quarters[..., 0, :], quarters[..., 1, :]
    cos, sin = cos_BT2F[:, :, None].to(x_BTHD.dtype), sin_BT2F[:, :, None].to(x_BTHD.dtype)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


# ---- network


class ChatGLMAttention(nn.Module):
    """Every head's rows of `query_key_value` lie together: q, k, v of head 0, then of head 1, ..."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        linear = linear_class(config.quantization_bit)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5  # the published layer-wise scaling cancels in exact arithmetic
        self.query_key_value = linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, dim=-1)
        q, k = rotate_2d(q, *tables), rotate_2d(k, *tables)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.dense(out.flatten(-2)), weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        linear = linear_class(config.quantization_bit)
        self.dense_h_to_4h = linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed = self.input_layernorm(x)
        x = ALPHA * normed + self.attention(normed, tables, attention_mask, past_key_values, **kwargs)[0]
        normed = self.post_attention_layernorm(x)
        return ALPHA * normed + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, PackedLinear):
            super()._init_weights(module)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The network without its head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        config.check_network()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; the embeddings may be stored in fewer bits."""
        return self.final_layernorm.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
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
        """Run whole sequences, or the next tokens of cached ones.

        attention_mask [B, S]: 1 = keep. position_ids [B, 2, T]: computed from `input_ids` when not given, which needs
        whole sequences. A cache may also hold a prefix that is no part of the sequences (`prefix_cache`).
        """
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask)
        x = (self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds).to(self.dtype)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = glm_mask(self.config, x, attention_mask, position_ids, past_key_values)
        tables = rotary_tables(self.config, position_ids)
        for layer in self.layers:
            x = layer(x, tables, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(x), past_key_values=past_key_values)

    def _positions(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ModelError("ChatGLM-6B reads positions off the token ids: with inputs_embeds, give position_ids too")
        own = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return batch_positions(self.config, input_ids, own)


def glm_mask(
    config: ChatGLMConfig,
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids_B2T: torch.Tensor,
    past_key_values: Cache | None,
) -> Any:
    """Causal, and open both ways between the prompt tokens of this call: those whose second position is 0."""
    in_prompt_BT = position_ids_B2T[:, 1] == 0
    blocks = None
    if x.shape[1] > 1 and config._attn_implementation != IMPLEMENTATION:
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        blocks = F.pad(torch.where(in_prompt_BT, 0, -1), (past, 0), value=-1)
    return create_causal_mask(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        block_sequence_ids=blocks,
    )


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its head, which in effect is the embedding table."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = HalfLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

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
        """See `ChatGLMModel.forward`. labels [B, T]: -100 = not a target; shifted inside; mean over the targets."""
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """None: the next positions follow from the ids, not from the last positions plus one."""
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if kwargs.pop("position_ids", None) is not None:
            raise ModelError("generate() computes the positions of ChatGLM-6B itself; leave position_ids out")
        own = attention_mask
        if own is not None and own.ndim == 2:
            own = own[:, -input_ids.shape[1] :]
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=batch_positions(self.config, input_ids, own),
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(
        config: ChatGLMConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
        **_: Any,
    ) -> Any:
        """The mask that generation makes in advance for caches of fixed size; without this it would be causal."""
        return glm_mask(config, inputs_embeds, attention_mask, position_ids, past_key_values)


def prefix_cache(config: ChatGLMConfig, prefix: torch.Tensor, batch_size: int) -> DynamicCache:
    """A cache that opens with a P-Tuning v2 prefix, for `past_key_values`.

    prefix [P, 2 * layers * hidden]: for every prefix token, key and value of layer 0, of layer 1, ... They are not
    rotated and do not shift the positions; attention_mask, when given, must count the P tokens too.
    """
    heads = (2 * config.num_layers, config.num_attention_heads, config.head_dim)
    parts_2LHPD = prefix.unflatten(-1, heads).permute(1, 2, 0, 3)
    parts = parts_2LHPD[:, None].expand(-1, batch_size, -1, -1, -1)
    return DynamicCache([(parts[2 * i], parts[2 * i + 1]) for i in range(config.num_layers)])


AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
