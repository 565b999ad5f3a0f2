"""Which tokens a corpus is worth, what is held out, and a fresh vocabulary that loses nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pingjia.chat import load_tokenizer
from pingjia.chat.extend import BpeBase, Extension
from pingjia.chat.hf import HFTokenizer
from pingjia.data import bpe
from pingjia.data.bpe import Corpus, compare, extend, measure, train_fresh
from pingjia.errors import DataError, ModelError

SAMPLES = [f"samples:{name}.jsonl" for name in ("customer_service", "tutoring", "writing")]


@pytest.fixture(scope="module")
def base() -> BpeBase:
    try:
        return BpeBase(load_tokenizer("smollm2"), "smollm2")
    except ModelError as e:
        pytest.skip(f"the packaged model's tokenizer is needed: {e}")


@pytest.fixture(scope="module")
def learn(base: BpeBase) -> Callable[..., Extension]:
    def run(texts: list[str], num_tokens: int = 100, min_frequency: int = 2) -> Extension:
        return extend(base, lambda: texts, num_tokens, min_frequency)

    return run


@pytest.fixture(scope="module")
def extension(base: BpeBase) -> Extension:
    return extend(base, Corpus(SAMPLES).learnt, 400, 5)


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    def write(count: int, extra: str = "") -> Path:
        file = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"问{i}", "response": f"答{i}"} for i in range(count)]
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) + extra, encoding="utf-8")
        return file

    return write


def texts_of(extension: Extension) -> list[str]:
    return [t.text for t in extension.tokens]


# ---- what is learnt


def test_the_most_frequent_comes_first(learn: Callable[..., Extension]) -> None:
    """冰 and 箱 take two tokens of the base each and occur 9 times, 洗衣机 3 times; a pair costs nothing before its
    characters are there."""
    texts = ["冰箱。"] * 9 + ["洗衣机！"] * 3
    found = texts_of(learn(texts))
    assert found[:3] == ["冰", "箱", "冰箱"] or found[:3] == ["箱", "冰", "冰箱"]
    assert found.index("冰箱") < found.index("洗衣机")
    assert texts_of(learn(texts, num_tokens=3)) == found[:3]


def test_min_frequency(learn: Callable[..., Extension]) -> None:
    texts = ["冰箱。"] * 4 + ["葡萄。"] * 3
    assert "葡萄" not in texts_of(learn(texts, min_frequency=4))
    assert "葡萄" in texts_of(learn(texts, min_frequency=3))


def test_only_chinese_is_merged(learn: Callable[..., Extension], base: BpeBase) -> None:
    texts = ["zqxj zqxj 冰a冰b😀😀😀ボタン＿ 𠮷野家 ...。"] * 20
    found = learn(texts)
    assert {"冰", "野家", "𠮷"} <= set(texts_of(found))
    for token in found.tokens:
        whole = re.fullmatch(f"[{bpe.CHINESE}]+", token.text)
        assert whole or (len(token.content) >= 2 and begins_chinese(token.content)), token


def begins_chinese(start: bytes) -> bool:
    """Whether every character of Unicode that begins with these bytes is one that may be merged."""
    ends = [start + bytes([second]) for second in range(0x80, 0xC0)]
    ends += [end + b"\x80" for end in ends] if start[0] >= 0xF0 else []
    characters = [text for e in ends if len(text := e.decode("utf-8", "ignore")) == 1]
    return bool(characters) and all(re.fullmatch(f"[{bpe.CHINESE}]", c) for c in characters)


def test_the_first_bytes_of_every_range_are_its_own() -> None:
    """Else a token for two bytes would change texts that are not Chinese."""
    inside: dict[bytes, set[bool]] = {}
    for point in [*range(0x800, 0xD800), *range(0xE000, 0x110000)]:
        inside.setdefault(chr(point).encode()[:2], set()).add(bool(re.fullmatch(f"[{bpe.CHINESE}]", chr(point))))
    assert [start for start, kinds in inside.items() if kinds == {True, False}] == []


def test_no_token_is_longer_than_eight_characters(learn: Callable[..., Extension]) -> None:
    assert "人工智能语言模型" in texts_of(learn(["人工智能语言模型"] * 50, num_tokens=60))
    found = texts_of(learn(["人工智能语言模型助"] * 50, num_tokens=60))
    assert 4 <= max(map(len, found)) <= bpe.MAX_CHARACTERS == 8


def test_words_of_the_base_are_the_parts(learn: Callable[..., Extension], base: BpeBase) -> None:
    """文件 is one token of the base; 文件夹 is made of it and 夹, which is not."""
    (token,) = [t for t in learn(["文件夹。"] * 9).tokens if t.text == "文件夹"]
    assert token.pieces == (*base.tokenizer.encode("文件"), *base.tokenizer.encode("夹"))


def test_a_corpus_that_offers_less_gives_what_there_is(learn: Callable[..., Extension]) -> None:
    assert set(texts_of(learn(["冰箱。"] * 9, num_tokens=1000))) == {"冰", "箱", "冰箱"}


@pytest.mark.parametrize("texts", [["only English"], ["的一是不"], ["冰箱"]], ids=["english", "known", "seen once"])
def test_nothing_to_add(learn: Callable[..., Extension], texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"occurs 2 times .* there is nothing to add; give more text or a lower --min"):
        learn(texts)


def test_an_empty_corpus(learn: Callable[..., Extension]) -> None:
    with pytest.raises(DataError, match="no text to learn from"):
        learn([])
    with pytest.raises(DataError, match="no text to learn from"):
        train_fresh(lambda: [], 1000, 2)


def test_the_same_corpus_gives_the_same_tokens(base: BpeBase, extension: Extension) -> None:
    again = extend(base, Corpus(SAMPLES).learnt, 400, 5)
    assert again.digest == extension.digest
    assert again.tokenizer.template_digest == extension.tokenizer.template_digest


def test_real_text_takes_a_quarter_less_also_where_it_was_not_seen(base: BpeBase, extension: Extension) -> None:
    corpus = Corpus(SAMPLES)
    for texts in (corpus.learnt(), corpus.unseen()):
        fit = compare(texts, base.tokenizer, extension)
        assert fit.num_after < 0.75 * fit.num_before
        assert fit.after == pytest.approx(fit.num_characters / fit.num_after)


def test_the_comparison_notices_a_text_that_is_cut_otherwise(base: BpeBase, extension: Extension) -> None:
    other = Extension(train_fresh(lambda: ["abc"], 300, 2), extension.tokens)
    with pytest.raises(ModelError, match=r"cuts the text that begins '冰箱' in another way"):
        compare(["冰箱"], base.tokenizer, other)


def test_public_chinese_rows(base: BpeBase, shared: Path) -> None:
    corpus = Corpus([str(shared / "alpaca_zh_demo.json")])
    extension = extend(base, corpus.learnt, 1000, 5)
    assert corpus.num_rows > 500
    unseen = compare(corpus.unseen(), base.tokenizer, extension)
    assert unseen.before is not None
    assert unseen.after is not None
    assert unseen.after > 1.5 * unseen.before


def test_a_large_corpus_is_sampled_and_says_so(base: BpeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer gets at most MAX_LEARNT characters, questions and answers alike; the tokens are nearly the same."""
    monkeypatch.setattr(bpe, "MAX_LEARNT", 12_000)
    taken: list[str] = []
    in_symbols = bpe._in_symbols
    monkeypatch.setattr(bpe, "_in_symbols", lambda a, t: in_symbols(a, (taken.append(x) or x for x in t)))  # type: ignore[func-returns-value]
    notes: list[str] = []
    corpus = Corpus(SAMPLES)
    sampled = extend(base, corpus.learnt, 200, 5, notes.append)
    (note,) = notes
    assert re.fullmatch(r"learning from a sample, \d\d% of the [\d,]+ characters: more would only take memory", note)
    texts = list(corpus.learnt())
    assert 0.3 < len(taken) / len(texts) < 0.6
    assert 0.3 < len(set(taken) & set(texts[::2])) / len(set(texts[::2])) < 0.6
    monkeypatch.undo()
    whole = extend(base, corpus.learnt, 200, 5)
    fits = [compare(corpus.unseen(), base.tokenizer, e).num_after for e in (whole, sampled)]
    assert len(sampled.tokens) == 200
    assert fits[1] < 1.05 * fits[0]


# ---- what is read


def test_every_tenth_row_is_held_out(rows_file: Callable[..., Path]) -> None:
    corpus = Corpus([str(rows_file(25))])
    unseen, learnt = list(corpus.unseen()), list(corpus.learnt())
    assert unseen == ["问9", "答9", "问19", "答19"]
    assert len(learnt) == 46
    assert not set(learnt) & set(unseen)
    assert corpus.num_rows == 23


def test_with_held_out_files_everything_else_is_learnt(rows_file: Callable[..., Path]) -> None:
    corpus = Corpus([str(rows_file(25))], held_out=["samples:writing.heldout.jsonl"])
    assert len(list(corpus.learnt())) == 50
    assert len(list(corpus.unseen())) == 48


def test_bad_rows_are_counted_and_bad_files_end_it(rows_file: Callable[..., Path], tmp_path: Path) -> None:
    corpus = Corpus([str(rows_file(3, "not json\n{}\n"))])
    assert len(list(corpus.learnt())) == 6
    assert corpus.num_bad_rows == 2
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        list(Corpus([str(tmp_path / "nowhere.jsonl")]).learnt())


# ---- a fresh vocabulary


@pytest.fixture(scope="module")
def fresh() -> HFTokenizer:
    return train_fresh(Corpus(SAMPLES).learnt, 2000, 2)


texts = st.text(
    st.characters(codec="utf-8") | st.sampled_from("冰箱保修，。？ 　\n\t1290abc'sé😀👍🏽\u200d"), max_size=60
)


@given(texts)
@example("冰箱iPhone15保修36个月，don't！\r\n  \n x")
def test_fresh_encoding_loses_nothing_and_streams(fresh: HFTokenizer, text: str) -> None:
    assume(not any(special in text for special in bpe.SPECIALS))
    ids = fresh.encode(text)
    assert fresh.decode(ids) == text
    stream = fresh.stream()
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == text


def test_fresh_words_are_chinese_or_other_never_both(fresh: HFTokenizer) -> None:
    vocabulary = fresh.vocabulary
    assert vocabulary.pre_tokenizer is not None
    cut = vocabulary.pre_tokenizer.pre_tokenize_str("买iPhone15保修don't，  x")
    pieces = [fresh_text(piece) for piece, _ in cut]
    assert pieces == ["买", "iPhone", "1", "5", "保修", "don", "'t", "，", " ", " x"]


def fresh_text(piece: str) -> str:
    from pingjia.chat.pieces import byte_alphabet

    return bytes(byte_alphabet().index(c) for c in piece).decode()


def test_fresh_size_and_fit(fresh: HFTokenizer) -> None:
    assert fresh.vocab_size == 2000
    fit = measure(Corpus(SAMPLES).unseen(), fresh)
    assert fit.before is None
    assert fit.after is not None
    assert fit.after > 1
    assert train_fresh(lambda: ["冰箱"] * 3, 2000, 2).vocab_size < 300


def test_fresh_has_a_form_of_conversation(fresh: HFTokenizer, tmp_path: Path) -> None:
    fresh.save(tmp_path)
    again: Any = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "保修<|im_end|>多久？"}]
    ids = again.render(chat)
    assert ids == fresh.render(chat)
    assert again.stop_ids == fresh.stop_ids == frozenset({2})
    assert ids[0] == 1
    assert ids.count(2) == 1, "a typed end of turn is text"
    assert again.pad_id == 0
