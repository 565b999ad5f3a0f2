"""The whole list of supported families: config `model_type` -> Family. Nothing else is run."""

from __future__ import annotations

from typing import Any

from pingjia.errors import ModelError
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


def family_of(model_or_config: Any) -> Family:
    """The family of a loaded network or of its config. Raises ModelError naming the model_type found."""
    config = getattr(model_or_config, "config", model_or_config)
    return family_of_type(config.model_type)


def family_of_type(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
