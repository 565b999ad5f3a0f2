"""Streaming: the joined pieces are the decoded whole, no piece holds half a character, work per token is constant."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from pingjia.chat.hf import HFTokenizer
from pingjia.chat.pieces import WindowStream, byte_alphabet, stream_factory
from pingjia.chat.tokenizer import ByteStream, StreamDecoder

TEXTS = [
    "你好，世界！签收后15天内可退。",
    "繁體字、𠮷野家、〇、々",
    "👨‍👩‍👧‍👦 family, 👍🏽 ok, 🇨🇳 flag, 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "def f(x):\n\treturn {'a': x ** 2}  # 平方\r\n",
    "e\u0301 ﬁ \ufffd ½ عربى",
    " leading and  double  spaces ",
]
texts = st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF) | st.sampled_from("你好世界，😀👍🏽\u200d \nabc"))


def _one_by_one(stream: StreamDecoder, ids: Sequence[int]) -> list[str]:
    return [*(stream.feed([i]) for i in ids), stream.flush()]


def _chunks(draw: Callable[..., Any], ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(smollm2: HFTokenizer, text: str) -> None:
    pieces = _one_by_one(smollm2.stream(), smollm2.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@given(texts, st.data())
def test_any_text_in_any_chunks(smollm2: HFTokenizer, text: str, data: st.DataObject) -> None:
    ids = smollm2.encode(text)
    stream = smollm2.stream()
    pieces = [stream.feed(chunk) for chunk in _chunks(data.draw, ids)]
    assert "".join(pieces) + stream.flush() == smollm2.decode(ids)


@given(st.lists(st.integers(-5, 49_160), max_size=30))
def test_any_ids_as_the_library_decodes_them(smollm2: HFTokenizer, ids: list[int]) -> None:
    """Also ids in no order that text would give, broken bytes, special tokens, and ids beyond the vocabulary."""
    known = [i for i in ids if 0 <= i < 49_152]
    assert smollm2.decode(ids) == smollm2._vocabulary.decode(known, skip_special_tokens=True)
    assert "".join(_one_by_one(smollm2.stream(), ids)) == smollm2.decode(ids)


@given(st.binary(max_size=40))
@example(b"\xe4\xbd")
@example(b"\xf0\x9f\x98\xe4\xbd\xa0\xed\xa0\x80\xff")
def test_broken_bytes_become_the_same_marks(byte_level: tokenizers.Tokenizer, data: bytes) -> None:
    alphabet = byte_alphabet()
    ids = [byte_level.token_to_id(alphabet[b]) for b in data]
    pieces = _one_by_one(stream_factory(byte_level, frozenset())(), ids)
    assert "".join(pieces) == data.decode("utf-8", "replace") == byte_level.decode(ids)


def test_half_a_character_waits(smollm2: HFTokenizer) -> None:
    stream = smollm2.stream()
    first, *rest = smollm2.encode("你")
    assert stream.feed([first]) == ""
    assert stream.feed(rest) == "你"
    assert stream.flush() == ""


def test_what_never_became_a_character_comes_at_the_end(smollm2: HFTokenizer) -> None:
    stream = smollm2.stream()
    first = smollm2.encode("你")[0]
    assert stream.feed([first]) == ""
    assert stream.flush() == "\ufffd" == smollm2.decode([first])


@given(texts, st.data())
@example("Hello 你好 ▁ <0x0A>", None)
def test_every_kind_of_vocabulary(vocabulary: tokenizers.Tokenizer, text: str, data: st.DataObject | None) -> None:
    special = frozenset(i for i, t in vocabulary.get_added_tokens_decoder().items() if t.special)
    ids = vocabulary.encode(text, add_special_tokens=False).ids
    stream = stream_factory(vocabulary, special)()
    chunks = _chunks(data.draw, ids) if data else [[i] for i in ids]
    joined = "".join(stream.feed(c) for c in chunks) + stream.flush()
    assert joined == vocabulary.decode(ids, skip_special_tokens=True)


def test_byte_alphabet_is_the_published_one() -> None:
    assert sorted(byte_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for char, byte in (("Ġ", 0x20), ("Ċ", 0x0A), ("ĉ", 0x09), ("Ń", 0xAD), ("!", 0x21), ("ÿ", 0xFF)):
        assert byte_alphabet()[byte] == char


def test_work_per_token_does_not_grow() -> None:
    """Counted, not timed: each token's bytes are asked for once, and a window never grows with the answer."""
    asked: list[int] = []
    stream = ByteStream(lambda i: asked.append(i) or b"a")  # type: ignore[func-returns-value]
    for i in range(1000):
        stream.feed([i])
    assert asked == list(range(1000))

    sizes: list[int] = []
    window = WindowStream(lambda ids: sizes.append(len(ids)) or "a" * len(ids), frozenset())  # type: ignore[func-returns-value]
    assert "".join(_one_by_one(window, range(1000))) == "a" * 1000
    assert max(sizes) <= 5


def test_special_tokens_give_no_text(smollm2: HFTokenizer) -> None:
    assert smollm2.decode([1, *smollm2.encode("hi"), 2]) == "hi"
