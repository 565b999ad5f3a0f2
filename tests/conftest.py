"""What tests of several rooms share: public files beside the repository, and a network that trains in a second."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="pingjia-tests-")  # a server under test finds nobody's batches

from pingjia.chat import load_tokenizer
from pingjia.errors import ModelError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public reference files beside the repository; without it the test is skipped, loudly."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"public reference files are needed in {folder}")
    return folder


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama(seed, **config): a random Llama with SmolLM2's tokenizer, saved as a model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    try:
        tokenizer = load_tokenizer("smollm2")
    except ModelError as e:
        pytest.skip(f"the packaged model's tokenizer is needed: {e}")
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }

    def make(seed: int = 0, **config: object) -> Path:
        directory = tmp_path_factory.mktemp("llama")
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones otherwise, in every random network alike
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(directory)
        tokenizer.save(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: Callable[..., Path]) -> Path:
    """A model directory: three layers, hidden size 64, random weights, SmolLM2's tokenizer."""
    return make_llama(0)


@pytest.fixture(scope="session")
def extended_llama(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """extended_llama(is_tied): the tiny network with 120 Chinese tokens more, learnt from the packaged samples."""
    from functools import cache

    from pingjia.chat.extend import BpeBase
    from pingjia.data.bpe import Corpus, extend
    from pingjia.models.vocabulary import AddedRows, extend_model

    @cache
    def make(is_tied: bool) -> Path:
        base, out = make_llama(0, tie_word_embeddings=is_tied), tmp_path_factory.mktemp("extended")
        vocabulary = BpeBase(load_tokenizer(base))
        extension = extend(vocabulary, Corpus(["samples:customer_service.jsonl"]).learnt, 120, 5)
        rows = AddedRows(vocabulary.first_new, [t.pieces for t in extension.tokens], extension.digest)
        extend_model(base, out, rows)
        extension.tokenizer.save(out)
        return out

    return make
