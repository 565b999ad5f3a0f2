"""A tiny random network with a tokenizer of letters, and SmolLM2 loaded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pingjia.chat import StreamDecoder, Tokenizer, load_tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.errors import ModelError
from pingjia.models import load_model
from pingjia.types import Encoded, Example, Message

VOCAB = 128


class Letters:
    """StreamDecoder of `LetterTokenizer`."""

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i >= 3)

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    """A character is its own id; 0 pads, 1 begins, 2 ends."""

    family = "hf"
    vocab_size = VOCAB
    pad_id = 0
    stop_ids = frozenset({2})
    template_digest = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return Letters().feed(ids)

    def render_text(self, text: str) -> list[int]:
        return [1, *self.encode(text)]

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        contents = [m.content if isinstance(m, Message) else m["content"] for m in messages]
        return [1, *self.encode("|".join(contents))]

    def encode_example(self, example: Example) -> Encoded:
        raise ModelError("not used by the engine")

    def stream_answer(self) -> StreamDecoder:
        return self.stream()

    def stream(self) -> StreamDecoder:
        return Letters()

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode() if 3 <= token < VOCAB else b""

    def save(self, directory: Path) -> None:
        raise ModelError("not used by the engine")


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    return LetterTokenizer()


def make_tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Random weights, large enough that answers are not all the same token."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., LlamaForCausalLM]:
    return make_tiny_model


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    return make_tiny_model()


@pytest.fixture
def tiny_engine(letters: Tokenizer) -> Callable[..., Engine]:
    """tiny_engine(model=None, **settings) -> Engine."""

    def make(model: PreTrainedModel | None = None, **settings: Any) -> Engine:
        return Engine(model or make_tiny_model(), tokenizer=letters, settings=EngineSettings(**settings))

    return make


def plain_greedy(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int, stop_ids: frozenset[int]) -> list[int]:
    """transformers' own `generate`, one prompt, no engine; switches the network's attention back for it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        out = model.generate(
            torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=0,
        )  # fmt: skip
    finally:
        model.set_attn_implementation(before)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[int]]:
    return plain_greedy


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, Tokenizer]:
    return load_model("smollm2"), load_tokenizer("smollm2")
