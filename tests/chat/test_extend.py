"""An extended vocabulary is the base's with new tokens on top: spelt out, its ids are the base's, for every text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from pingjia.chat import golden_chats, load_tokenizer
from pingjia.chat.extend import BpeBase, Extension, Join
from pingjia.chat.gguf_vocabulary import _splitter
from pingjia.chat.hf import HFTokenizer, Parts
from pingjia.errors import ModelError

TRAINED_ON = ["the price of the shop, 12 yuan", "数据和文件，一个文件。数据", " 分 a 分 的的的", "Ω≈ç √∫ привет"] * 4
WORDS = ["冰箱", "保修", "葡萄", "数据库", "的冰箱", "？！", "𠮷野家", "一个月", "月数"]
texts = st.text(
    st.characters(codec="utf-8", max_codepoint=0x3FFFF)
    | st.sampled_from("冰箱保修葡萄数据库的𠮷野家，？ \nabc1😀👍🏽"),
    max_size=40,
)
no_chinese = st.text(
    st.characters(codec="utf-8", max_codepoint=0x2FFF) | st.sampled_from("😀👍🏽🇨🇳한국어 ｶﾅ"), max_size=40
)


def as_tokenizer(vocabulary: tokenizers.Tokenizer) -> HFTokenizer:
    return HFTokenizer(Parts(vocabulary, None, {}, frozenset(), 0))


def byte_level(split: str, **model: Any) -> HFTokenizer:
    """A byte-level BPE whose added tokens are numbered behind it, as Qwen has them, with a rest of one entry kept."""
    vocabulary = tokenizers.Tokenizer(models.BPE(**model))
    vocabulary.pre_tokenizer = _splitter(split)
    vocabulary.decoder = decoders.ByteLevel()
    if split == "qwen2":
        vocabulary.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary.train_from_iterator(
        TRAINED_ON, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    vocabulary.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return as_tokenizer(vocabulary)


def llama_2() -> HFTokenizer:
    """Characters looked up whole, unknown ones as bytes, a space before every text."""
    letters = sorted(set("".join(TRAINED_ON)) - {" "})
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters, "数据", "▁t"]
    vocabulary = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(entries)},
            merges=[("数", "据"), ("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    vocabulary.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    vocabulary.decoder = decoders.Sequence(steps)
    vocabulary.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return as_tokenizer(vocabulary)


BASES: dict[str, Callable[[], HFTokenizer]] = {
    "gpt-2": lambda: byte_level("smollm"),
    "qwen": lambda: byte_level("qwen2"),
    "llama 3": lambda: byte_level("llama-bpe", ignore_merges=True),
    "llama 2": llama_2,
}


def joins_of(base: BpeBase, words: list[str]) -> list[Join]:
    """Every character of the words, then the words from left to right."""
    spelt = {c: base.pieces_of(c) for c in dict.fromkeys("".join(words))}
    joins = [Join(p[:-1], p[-1:]) for p in spelt.values() if p and len(p) > 1]
    for word in words:
        left = spelt[word[0]]
        for c in word[1:]:
            right = spelt[c]
            assert left
            assert right
            joins.append(Join(left, right))
            left = left + right
    return joins


@pytest.fixture(scope="module", params=[*BASES, "smollm2"])
def base(request: pytest.FixtureRequest) -> BpeBase:
    made = BASES[request.param]() if request.param in BASES else request.getfixturevalue("smollm2")
    return BpeBase(made, request.param)


@pytest.fixture(scope="module")
def extension(base: BpeBase) -> Extension:
    return base.extend(joins_of(base, WORDS), 1000)


def test_new_tokens_are_used(base: BpeBase, extension: Extension) -> None:
    ids = extension.tokenizer.encode("冰箱保修")
    assert [t for t in ids if t >= base.first_new] == ids[-2:]
    assert len(ids) < len(base.tokenizer.encode("冰箱保修"))
    assert extension.tokenizer.vocab_size == base.first_new + len(extension.tokens)
    assert [t.id for t in extension.tokens] == list(range(base.first_new, extension.tokenizer.vocab_size))
    assert {"冰", "冰箱", "葡萄"} <= {t.text for t in extension.tokens}


@given(texts)
@example("数据库 的冰箱？！月数据")
@example(" 冰 分a冰箱\n\n冰箱<|end|>葡萄<think>")
@example("𠮷野家、〇々　Ａ１")
def test_spelt_out_the_ids_are_the_bases(base: BpeBase, extension: Extension, text: str) -> None:
    assert extension.spelt(extension.tokenizer.encode(text)) == base.tokenizer.encode(text)


@given(no_chinese)
def test_a_text_without_chinese_keeps_its_ids(base: BpeBase, extension: Extension, text: str) -> None:
    assert extension.tokenizer.encode(text) == base.tokenizer.encode(text)


@given(texts)
@example("👨‍👩‍👧‍👦 葡萄🍇冰箱 🏴󠁧󠁢󠁥󠁮󠁧󠁿")
def test_decoding_is_as_before_and_streams_exactly(base: BpeBase, extension: Extension, text: str) -> None:
    ids = extension.tokenizer.encode(text)
    decoded = extension.tokenizer.decode(ids)
    assert decoded == base.tokenizer.decode(base.tokenizer.encode(text))
    stream = extension.tokenizer.stream()
    pieces = [*(stream.feed([i]) for i in ids), stream.flush()]
    assert "".join(pieces) == decoded
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
def test_any_ids_in_any_order_stream_as_they_decode(extension: Extension, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, extension.tokenizer.vocab_size + 5), max_size=20))
    stream = extension.tokenizer.stream()
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == extension.tokenizer.decode(ids)


def test_saved_files_are_read_by_anyone(base: BpeBase, extension: Extension, tmp_path: Path) -> None:
    extension.tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ["的冰箱？！ hello", "葡萄<|end|><think>𠮷", "12 yuan"]:
        assert again.encode(text) == extension.tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == extension.tokenizer.encode(text)
    assert again.vocab_size == extension.tokenizer.vocab_size
    specials = base.tokenizer.vocabulary.get_added_tokens_decoder()
    assert {i: str(t) for i, t in theirs.get_added_tokens_decoder().items()} == {i: str(t) for i, t in specials.items()}


def test_it_can_be_extended_again(extension: Extension) -> None:
    second = BpeBase(extension.tokenizer)
    again = second.extend(joins_of(second, ["苹果", "冰箱门"]), 100)
    assert again.tokens[0].id == extension.tokenizer.vocab_size
    for text in ["苹果和冰箱门", "冰箱", "apple"]:
        assert again.spelt(again.tokenizer.encode(text)) == extension.tokenizer.encode(text)


def test_the_template_and_the_golden_chats(smollm2: HFTokenizer) -> None:
    base = BpeBase(smollm2)
    extension = base.extend(joins_of(base, WORDS), 100)
    assert extension.tokenizer.stop_ids == smollm2.stop_ids
    for before, after in zip(golden_chats(smollm2), golden_chats(extension.tokenizer), strict=True):
        assert extension.spelt(after["ids"]) == before["ids"]
    assert extension.tokenizer.template_digest != smollm2.template_digest


# ---- which joins are taken


def test_a_join_that_cannot_be_made_is_passed_over(smollm2: HFTokenizer) -> None:
    base = BpeBase(smollm2)
    ice, box = base.pieces_of("冰"), base.pieces_of("箱")
    assert ice
    assert box
    data = tuple(base.tokenizer.encode("数据"))  # one token already
    parts = (*base.tokenizer.encode("数"), *base.tokenizer.encode("据"))
    assert not base.extend([Join(ice, box)], 9).tokens, "its parts are no tokens"
    assert not base.extend([Join(parts[:1], parts[1:])], 9).tokens, "the base never writes it so"
    assert len(data) == 1


def test_no_more_than_asked_for_with_the_steps_of_a_character_counted(smollm2: HFTokenizer) -> None:
    base = BpeBase(smollm2)
    grape = base.pieces_of("葡")
    assert grape
    assert len(grape) == 3
    join = Join(grape[:-1], grape[-1:])
    assert not base.extend([join], 1).tokens
    tokens = base.extend([join], 2).tokens
    assert [t.content for t in tokens] == ["葡".encode()[:2], "葡".encode()]
    assert [t.pieces for t in tokens] == [grape[:2], grape]


# ---- what cannot be extended


@pytest.mark.parametrize(
    ("kind", "message"), [("unigram", "it is a Unigram, not a BPE"), ("wordpiece", "it is a WordPiece, not a BPE")]
)
def test_other_vocabularies_are_refused(kind: str, message: str, unigram_vocabulary: tokenizers.Tokenizer) -> None:
    made = unigram_vocabulary
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match=f"mine: this vocabulary cannot be extended: {message}"):
        BpeBase(as_tokenizer(made), "mine")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"end_of_word_suffix": "</w>"}, "carry marks"),
        ({"dropout": 0.1}, "cuts at random"),
        ({"unk_token": "?", "vocab": {"?": 0}, "merges": []}, "no way to write a character"),
    ],
)
def test_other_kinds_of_bpe_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        BpeBase(as_tokenizer(tokenizers.Tokenizer(models.BPE(**model))))


@pytest.mark.parametrize(("directory", "family"), [("tiny_v1_chat", "chatglm"), ("tiny_v2", "chatglm2")])
def test_chatglm_is_refused_with_the_reason(shared: Path, directory: str, family: str) -> None:
    tokenizer = load_tokenizer(shared / "fixtures" / "chatglm" / directory)
    with pytest.raises(ModelError, match=rf"of {family} is not extended: .* have fixed ids .* no place"):
        BpeBase(tokenizer, "models/chatglm")
