"""Tokenizers for the chat tests: the packaged model's, and tiny ones trained here of every kind we must decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from pingjia.chat import load_tokenizer
from pingjia.chat.hf import HFTokenizer
from pingjia.errors import ModelError
from pingjia.locate import locate_model

settings.register_profile("chat", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("chat")

CORPUS = [
    "你好，世界！今天的天气很好，我们去公园吧。",
    "退货需要在签收后15天内申请，运费由商家承担。",
    "The quick brown fox jumps over the lazy dog. Hello, world!",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "price = {'a': 12.50, 'b': 13}; print(price['a'])",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _special(names: list[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level_bpe(specials: list[str] | None = None) -> tokenizers.Tokenizer:
    """As of GPT-2, Qwen, Llama 3, GLM-4."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(_special(SPECIALS if specials is None else specials))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.add_tokens([AddedToken("机器学习", special=False, normalized=False)])
    return tokenizer


def sentencepiece_bpe() -> tokenizers.Tokenizer:
    """As of Llama 2: dummy prefix, unknown characters as bytes."""
    alphabet = sorted(set("".join(CORPUS)) - {" "})
    vocab = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *alphabet])
    }
    merges = [("▁", "T"), ("▁T", "h"), ("你", "好"), ("o", "r")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_special(["<unk>", "<s>", "</s>"]))
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """As of T5 and XGLM: word starts marked, scores instead of merges, "</s>" an ordinary piece of the model."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁hello", -3.0), ("你好", -3.0), ("世界", -3.5)]
    seen = {p for p, _ in pieces}
    pieces += [(c, -6.0) for c in sorted(set("".join(CORPUS) + "<>/s")) if c not in seen and c != " "]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(_special(["<unk>", "</s>"]))
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    """As of Chinese GPT-2 models that use BERT's vocabulary."""
    words = ["[UNK]", "[SEP]", "hello", "wor", "##ld", "##s", ".", ",", "!", *sorted(set("你好世界今天天气"))]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(_special(["[UNK]", "[SEP]"]))
    return tokenizer


VOCABULARIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level_bpe,
    "sentencepiece": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def write_model(
    directory: Path, vocabulary: tokenizers.Tokenizer, tokenizer_config: dict[str, Any] | None = None, **files: Any
) -> Path:
    """A model directory: tokenizer.json, tokenizer_config.json and any NAME=object as NAME.json."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(directory / "tokenizer.json"))
    for name, value in {"tokenizer_config": tokenizer_config or {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return locate_model("smollm2")
    except ModelError as e:
        pytest.skip(f"the packaged model is needed: {e}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> HFTokenizer:
    tokenizer = load_tokenizer("smollm2")
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> Any:
    """The same GGUF as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.fixture(scope="session", params=sorted(VOCABULARIES))
def vocabulary(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """One of every kind."""
    return VOCABULARIES[request.param]()


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    return byte_level_bpe()


@pytest.fixture(scope="session")
def train_bpe() -> Callable[[list[str]], tokenizers.Tokenizer]:
    """A byte-level vocabulary with special tokens of one's own."""
    return byte_level_bpe


@pytest.fixture(scope="session")
def unigram_vocabulary() -> tokenizers.Tokenizer:
    return unigram()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., HFTokenizer]:
    """Write a model directory and load it: make_model(vocabulary, template=..., config keys...)."""

    def make(vocabulary: tokenizers.Tokenizer, template: str | None = CHATML, **config: Any) -> HFTokenizer:
        config.setdefault("eos_token", "<|im_end|>")
        if template is not None:
            config["chat_template"] = template
        tokenizer = load_tokenizer(write_model(tmp_path / "model", vocabulary, config))
        assert isinstance(tokenizer, HFTokenizer)
        return tokenizer

    return make


@pytest.fixture
def model_writer() -> Callable[..., Path]:
    return write_model
