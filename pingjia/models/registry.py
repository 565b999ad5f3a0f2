"""The whole list of supported families: config `model_type` -> Family. Nothing else is run."""

from __future__ import annotations

from typing import Any

from pingjia.errors import ModelError
from pingjia.models import chatglm, chatglm2
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.models.family import LLAMA_LIKE, Family

GLM4 = Family(
    name="glm-4",
    causal_prompt=True,
    lora_groups={
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "ffn": ("gate_up_proj", "down_proj"),
        "embedding": ("embed_tokens",),
    },
    default_target=("q_proj", "v_proj"),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "glm": GLM4,
    "glm4": GLM4,
}

# All generations of ChatGLM write model_type "chatglm"; which one it is, their config class says.
SUPPORTED = tuple(sorted({*FAMILIES, "chatglm"}))


def family_of(model_or_config: Any) -> Family:
    """The family of a loaded network or of its config. Raises ModelError naming the model_type found."""
    config = getattr(model_or_config, "config", model_or_config)
    if isinstance(config, ChatGLMConfig):
        return chatglm.FAMILY
    if isinstance(config, ChatGLM2Config):
        return chatglm2.FAMILY
    require_supported(config.model_type)
    return FAMILIES[config.model_type]


def require_supported(model_type: str) -> None:
    """Raise ModelError naming the model_type unless this package runs it."""
    if model_type not in SUPPORTED:
        raise ModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
