"""The configs of the three ChatGLM generations, and how one is told from another.

All of them write `model_type: chatglm` and the same `architectures`, so the generation is told from the keys of
config.json and never from a name. ChatGLM2 and ChatGLM3 are one network; only their tokenizers differ
(`chat/chatglm.py`). Keys are those of the published files, so a saved config can be read by the published code too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

from transformers import AutoConfig, PreTrainedConfig

from pingjia.errors import ModelError

V1_KEYS = frozenset({"inner_hidden_size", "position_encoding_2d", "max_sequence_length", "gmask_token_id"})
V2_KEYS = frozenset(
    {"ffn_hidden_size", "kv_channels", "multi_query_attention", "multi_query_group_num", "padded_vocab_size"}
)
_NEEDED = {
    1: ("vocab_size", "hidden_size", "num_layers", "num_attention_heads"),
    2: ("padded_vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size"),
}


def generation_of(config: Mapping[str, Any]) -> int:
    """1 for ChatGLM-6B, 2 for ChatGLM2 and ChatGLM3, from the keys of a config.json.

    Raises ModelError naming what was found when it is neither or both, or when a key that shapes tensors is missing.
    """
    first, second = sorted(V1_KEYS & config.keys()), sorted(V2_KEYS & config.keys())
    if first and second:
        raise ModelError(f"config.json mixes ChatGLM-6B ({', '.join(first)}) and ChatGLM2 ({', '.join(second)}) keys")
    if not first and not second:
        raise ModelError(
            "config.json says model_type 'chatglm' but has no key of ChatGLM-6B (inner_hidden_size, "
            f"position_encoding_2d, ...) or ChatGLM2/3 (multi_query_group_num, padded_vocab_size, ...); found: "
            f"{', '.join(sorted(config)[:8])}"
        )
    generation = 1 if first else 2
    sizes = {config[key] for key in ("vocab_size", "padded_vocab_size") if key in config}
    if len(sizes) > 1:
        raise ModelError(f"config.json: vocab_size and padded_vocab_size differ: {sorted(sizes)}")
    missing = [key for key in _NEEDED[generation] if key not in config]
    if missing:
        raise ModelError(f"config.json of a ChatGLM{'-6B' if first else '2/3'} lacks {', '.join(missing)}")
    return generation


class _GenerationConfig(PreTrainedConfig):
    """What the two configs share: choosing the right one of them when a config.json is read."""

    model_type = "chatglm"
    quantization_bit: int | None = 0
    """Width of the linears as stored: 0 or None (floats), 4 or 8."""
    quantization_embeddings: bool = False
    pre_seq_len: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config of whichever generation `config_dict` describes, checked. Raises ModelError."""
        right = ChatGLMConfig if generation_of(config_dict) == 1 else ChatGLM2Config
        if cls is not right and cls is ChatGLMConfig:  # the class that AutoConfig knows; it speaks for both
            return cast(Self, right.from_dict(config_dict, **kwargs))
        if cls is not right:
            raise ModelError(f"config.json is that of a {right.__name__}, not of a {cls.__name__}")
        own = {k: v for k, v in config_dict.items() if k != "auto_map"}  # it names code that is never run
        made = super().from_dict(own, **kwargs)
        (made[0] if isinstance(made, tuple) else made).check()
        return made

    def check(self) -> None:
        """Raise ModelError when values contradict each other or ask for what the networks here do not compute."""
        for key in ("hidden_size", "num_layers", "num_attention_heads", "vocab_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or value <= 0:
                raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
        if self.quantization_bit not in (None, 0, 4, 8):
            raise ModelError(f"config.json: quantization_bit {self.quantization_bit!r}; 4 and 8 are supported")
        if self.quantization_bit == 4 and (self.hidden_size % 2 or self.intermediate_size % 2):
            raise ModelError("config.json: INT4 packs columns in pairs; hidden and inner sizes must be even")
        if self.pre_seq_len:
            raise ModelError(
                f"config.json: pre_seq_len {self.pre_seq_len}: checkpoints with a P-Tuning v2 prefix are not loaded; "
                "remove pre_seq_len to use the base network"
            )

    def check_network(self) -> None:
        """`check`, and refuse what only `load_chatglm` can read."""
        self.check()
        if self.quantization_embeddings:
            raise ModelError("config.json: quantised embeddings are read by load_model, not by from_pretrained")

    def _require(self, key: str, wanted: Any) -> None:
        if getattr(self, key) != wanted:
            raise ModelError(f"config.json: {key} {getattr(self, key)!r} is not supported (published: {wanted!r})")


class ChatGLMConfig(_GenerationConfig):
    """ChatGLM-6B, the original. Defaults are those of the published config.json."""

    attribute_map = {  # noqa: RUF012  (transformers reads it from the class)
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    pad_token_id: int = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        super().check()
        self._require("position_encoding_2d", True)
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ModelError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of 4 x {self.num_attention_heads} heads"
            )


class ChatGLM2Config(_GenerationConfig):
    """ChatGLM2-6B and ChatGLM3-6B. Defaults are those of the published config.json of ChatGLM2-6B."""

    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "max_position_embeddings": "seq_length",
    }
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 13696
    layernorm_epsilon: float = 1e-5
    seq_length: int = 32768
    rope_ratio: float = 1.0
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    pad_token_id: int = 0
    eos_token_id: int | list[int] = 2
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def check(self) -> None:
        super().check()
        self._require("multi_query_attention", True)
        self._require("rmsnorm", True)
        self._require("post_layer_norm", True)
        self._require("add_bias_linear", False)
        self._require("apply_residual_connection_post_layernorm", False)
        if self.num_attention_heads % self.multi_query_group_num:
            raise ModelError(
                f"config.json: {self.num_attention_heads} heads cannot share {self.multi_query_group_num} groups"
            )


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
