"""Special tokens have a name to show; tokens of text have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pingjia.chat import load_tokenizer
from pingjia.errors import ModelError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm"


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("smollm2", {"<|im_start|>", "<|im_end|>"}),
        (SHARED / "tiny_v1_chat", {"[gMASK]", "<sop>", "<eop>", "[MASK]", "<pad>", "<unk>"}),
        (SHARED / "tiny_v2", {"[gMASK]", "[sMASK]", "<sop>", "</s>"}),
    ],
)
def test_special_tokens_have_names_and_text_has_none(model: str | Path, names: set[str]) -> None:
    try:
        tokenizer = load_tokenizer(model)
    except ModelError as e:
        pytest.skip(f"model files are needed: {e}")
    found = {tokenizer.special_text(i) for i in range(tokenizer.vocab_size)} - {None}
    assert names <= found
    assert all(tokenizer.special_text(i) is not None for i in tokenizer.stop_ids)
    assert all(tokenizer.special_text(i) is None for i in tokenizer.encode("hello 你好"))
