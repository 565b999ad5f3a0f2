"""The bytes of single tokens: joined, they are the text that the tokens decode to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pingjia.chat import Tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "chatglm"
TEXTS = ['{"名字": "王小明", "n": [1, 2]}', "two  spaces,\n\ta tab", "emoji 🙂 é", "plain"]


def tokenizer_of(name: str) -> Tokenizer:
    if name == "smollm2":
        return load_tokenizer(name)
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    return load_tokenizer(SHARED / name)


@pytest.mark.parametrize("name", ["smollm2", "tokenizer", "tiny_v2"])
def test_the_bytes_of_the_tokens_are_the_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    told = 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        joined = b"".join(tokenizer.token_bytes(i) or b"" for i in ids).decode("utf-8", "replace").lstrip(" ")
        decoded = tokenizer.decode(ids)
        if "⁇" in decoded or "�" in decoded:
            continue  # a small vocabulary has no token for it
        told += 1
        assert joined == decoded
    assert told >= 2


@pytest.mark.parametrize("name", ["smollm2", "tokenizer", "tiny_v2"])
def test_special_and_unknown_tokens_have_none(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for token in (*tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size + 7):
        assert tokenizer.token_bytes(token) == b""
    unknown = [i for i in range(min(tokenizer.vocab_size, 10)) if "⁇" in tokenizer.decode([i])]
    assert all(tokenizer.token_bytes(i) == b"" for i in unknown)
