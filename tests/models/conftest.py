"""Tiny ChatGLM networks of every generation, with random weights, in memory and on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig

V1 = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "max_sequence_length": 128,
    "mask_token_id": 90,
    "gmask_token_id": 91,
    "bos_token_id": 92,
    "eos_token_id": 93,
    "pad_token_id": 3,
}
V2 = {
    "padded_vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 24,
    "seq_length": 128,
}
GMASK_SOP = [91, 92]


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough that every mistake shows, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.data = noise + ("layernorm.weight" in name)
    return model.eval()


@pytest.fixture
def v1() -> ChatGLMForCausalLM:
    return randomise(ChatGLMForCausalLM(ChatGLMConfig(**V1)), 1)


@pytest.fixture
def v2() -> ChatGLM2ForCausalLM:
    return randomise(ChatGLM2ForCausalLM(ChatGLM2Config(**V2)), 2)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Either generation; parametrize indirectly with "v1" or "v2"."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def prompts() -> Callable[[str], list[list[int]]]:
    """Prompts of different lengths, as the generation's tokenizer lays them out."""

    def of(generation: str) -> list[list[int]]:
        texts = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16], [20]]
        return [[*t, *GMASK_SOP] if generation == "v1" else [*GMASK_SOP, *t] for t in texts]

    return of


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a network and return the directory."""

    def save(model: PreTrainedModel, name: str = "model", **options: Any) -> Path:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save
