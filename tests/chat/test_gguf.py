"""The packaged GGUF's tokenizer: equal to the library's reading of the file and to transformers' ids."""

import re
import struct
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from pingjia.chat import load_tokenizer
from pingjia.chat.gguf_file import read_metadata
from pingjia.chat.gguf_vocabulary import build_vocabulary
from pingjia.chat.hf import HFTokenizer
from pingjia.errors import ModelError

TEXTS = [
    "你好，请问退货需要几天？签收后15天内可以。",
    "繁體中文：軟體與資料庫，臺灣。",
    "The quick brown fox doesn't jump; it's 3.14159 meters tall!",
    "2024-05-18 12:30:45, 1,234,567.89 yuan, 0x1F600",
    "表情😀👍🏽👨‍👩‍👧‍👦🇨🇳 done",
    "def f(x):\n\treturn [i ** 2 for i in range(10)]  # 平方\n\n\nprint(f(3))\r\n",
    "   leading, trailing   \n\n\n",
    "<|im_start|>user\nhi<|im_end|>",
    "∑ x² ≤ ½ · ①②③ Ⅷ",
    "",
]


def test_metadata_equals_the_library(smollm2_path: Path) -> None:
    from gguf import GGUFReader

    ours, theirs = read_metadata(smollm2_path), GGUFReader(smollm2_path).fields
    expected = {k: f.contents() for k, f in theirs.items() if not k.startswith("GGUF.")}
    assert ours == expected


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(smollm2: HFTokenizer, text: str) -> None:
    assert smollm2._vocabulary.decode(smollm2.encode(text), skip_special_tokens=False) == text


def _has_numeric_after_space(text: str) -> bool:
    """Where transformers' reading of this GGUF is known to differ; see the next test."""
    return any(a.isspace() and unicodedata.category(b)[0] == "N" for a, b in pairwise(text))


@pytest.mark.parametrize("text", [t for t in TEXTS if "½" not in t])
def test_ids_equal_transformers(smollm2: HFTokenizer, reference: Any, text: str) -> None:
    assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False)


@given(st.text())
@example("a 1 2 3\n4")
@example("👨‍👩‍👧 it's 中文123abc")
def test_any_ids_equal_transformers(smollm2: HFTokenizer, reference: Any, text: str) -> None:
    if not _has_numeric_after_space(text):
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False)


def test_digits_are_apart_as_the_vocabulary_was_trained(smollm2: HFTokenizer, reference: Any) -> None:
    """transformers drops the digit split of this GGUF (`pre` = smollm), so "  1" splits as " ", " 1" there.

    The vocabulary itself shows which is right: of its 49,152 tokens none joins a digit with anything, not even with
    the space before it, which the most frequent pair of English text would be had training seen " 1" as one word.
    """
    joined = [t for t in smollm2._vocabulary.get_vocab() if len(t) > 1 and re.search("[0-9]", t)]
    assert joined == []
    assert "½" in smollm2.decode(smollm2.encode("½"))
    for text, ours in (("a  1", ["a", "ĠĠ", "1"]), (" ½", ["Ġ", "Â½"])):
        assert [smollm2._vocabulary.id_to_token(i) for i in smollm2.encode(text)] == ours
    assert smollm2.encode("a  1") != reference.encode("a  1", add_special_tokens=False)
    assert smollm2.encode("共 12 元") == reference.encode("共 12 元", add_special_tokens=False)


def test_special_tokens_and_stop(smollm2: HFTokenizer) -> None:
    assert smollm2.stop_ids == {2}
    assert smollm2.pad_id == 2
    assert smollm2.vocab_size == 49152
    assert smollm2.render_text("hi") == smollm2.encode("hi")  # add_bos_token is false


# ---- other vocabularies in GGUF metadata


def _metadata(vocabulary: tokenizers.Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    import json

    model = json.loads(vocabulary.to_str())["model"]
    tokens = sorted(vocabulary.get_vocab().items(), key=lambda item: item[1])
    special = {t.content for t in vocabulary.get_added_tokens_decoder().values() if t.special}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [t for t, _ in tokens],
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t, _ in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        **more,
    }


@given(st.text())
@example("I'Ll pay 12345 元\r\n\n  ok e\u0301")
def test_qwen2_split_equals_transformers(byte_level: tokenizers.Tokenizer, text: str) -> None:
    from transformers import Qwen2Tokenizer

    metadata = _metadata(byte_level, "qwen2")
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]])
    ours = build_vocabulary(metadata, Path("x.gguf"))
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)


def test_llama_bpe_split(byte_level: tokenizers.Tokenizer) -> None:
    metadata = _metadata(byte_level, "llama-bpe", **{"tokenizer.ggml.bos_token_id": 0})
    vocabulary = build_vocabulary(metadata, Path("x.gguf"))
    pieces = vocabulary.pre_tokenizer.pre_tokenize_str("It's 12345 ok!!\n\nEnd  now")  # type: ignore[union-attr]
    expected = ["It", "'s", "Ġ", "123", "45", "Ġok", "!!ĊĊ", "End", "Ġ", "Ġnow"]
    assert [p for p, _ in pieces] == expected
    assert vocabulary.encode("a").ids[0] == 0  # bos is this kind's default


def test_llama_bpe_takes_whole_words_without_merging(byte_level: tokenizers.Tokenizer) -> None:
    metadata = _metadata(byte_level, "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("zqz")
    metadata["tokenizer.ggml.token_type"].append(1)
    vocabulary = build_vocabulary(metadata, Path("x.gguf"))
    assert vocabulary.encode("zqz").ids == [len(metadata["tokenizer.ggml.tokens"]) - 1]


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "tekken"), ("gpt2", None)])
def test_an_unknown_split_is_refused_by_name(model: str, pre: str | None) -> None:
    with pytest.raises(ModelError, match=repr(pre)):
        build_vocabulary({"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}, Path("x.gguf"))


# ---- broken files


def _gguf(pairs: bytes, count: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, count) + pairs


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "begin with GGUF"),
        (b"PK\x03\x04 a zip file", "begin with GGUF"),
        (_gguf(b"", 0, version=1), "version 1"),
        (_gguf(b"", 5), "not a readable GGUF"),
        (_gguf(struct.pack("<Q", 1 << 60), 1), "a length of"),
        (_gguf(struct.pack("<Q", 3) + b"ab", 1), "middle of a string"),
        (_gguf(struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99), 1), "not a readable GGUF"),
        (_gguf(b"", 0), "no tokenizer in this GGUF"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as e:
        load_tokenizer(path)
    assert "\n" not in str(e.value)


def test_a_cut_file_is_one_line(tmp_path: Path, smollm2_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with open(smollm2_path, "rb") as file:
        path.write_bytes(file.read(300_000))
    with pytest.raises(ModelError, match="fetch it again"):
        load_tokenizer(path)
