"""ROUGE and BLEU against the libraries this field uses, on random tokens and on real answers."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import jieba
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge

from pingjia.evaluate.metrics import (
    BERT_SCORE,
    SCORERS,
    TOKEN_PROBABILITY,
    Pair,
    bleu_4,
    lcs_length,
    rouge_l,
    rouge_n,
    score,
    score_all,
)
from pingjia.evaluate.settings import METRICS
from pingjia.evaluate.tokens import normalise, tokenise
from pingjia.similarity import Vectors, bert_scores

tokens = st.lists(st.sampled_from(["保修", "36", "个月", "，", "。", "!", "hello", "world", "的", "a"]), max_size=30)
some_tokens = tokens.filter(bool)


def reference_rouge(answer: list[str], expected: list[str]) -> dict[str, float]:
    scores = Rouge(exclusive=False).get_scores(" ".join(answer), " ".join(expected))[0]
    return {name: scores[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")}


def reference_bleu(answer: list[str], expected: list[str]) -> float:
    return sacrebleu.sentence_bleu(" ".join(answer), [" ".join(expected)], tokenize="none").score / 100


def naive_lcs(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        row = _next_row(row, a, right)
    return row[-1]


def _next_row(row: list[int], a: str, right: list[str]) -> list[int]:
    new = [0]
    for j, b in enumerate(right):
        new.append(row[j] + 1 if a == b else max(row[j + 1], new[j]))
    return new


@given(some_tokens, some_tokens)
def test_rouge_equals_rouge_chinese(answer: list[str], expected: list[str]) -> None:
    reference = reference_rouge(answer, expected)
    assert rouge_n(answer, expected, 1) == pytest.approx(reference["rouge-1"], abs=1e-6)
    assert rouge_n(answer, expected, 2) == pytest.approx(reference["rouge-2"], abs=1e-6)
    assert rouge_l(answer, expected) == pytest.approx(reference["rouge-l"], abs=1e-6)


@given(some_tokens, some_tokens)
def test_bleu_equals_sacrebleu(answer: list[str], expected: list[str]) -> None:
    assert bleu_4(answer, expected) == pytest.approx(reference_bleu(answer, expected), abs=1e-6)


@pytest.mark.parametrize("name", ["alpaca_zh_demo.json", "alpaca_en_demo.json"])
def test_real_answers_equal_both_libraries(shared: Path, name: str) -> None:
    rows = json.loads((shared / "data" / name).read_text(encoding="utf-8"))[:60]
    texts = [tokenise(row["output"])[:120] for row in rows if row["output"].strip()]
    for answer, expected in itertools.pairwise(texts):
        reference = reference_rouge(answer, expected)
        assert rouge_l(answer, expected) == pytest.approx(reference["rouge-l"], abs=1e-6)
        assert rouge_n(answer, expected, 1) == pytest.approx(reference["rouge-1"], abs=1e-6)
        assert bleu_4(answer, expected) == pytest.approx(reference_bleu(answer, expected), abs=1e-6)


@given(tokens, tokens)
def test_lcs_equals_the_textbook_table(left: list[str], right: list[str]) -> None:
    assert lcs_length(left, right) == naive_lcs(left, right)
    assert lcs_length(right, left) == lcs_length(left, right)


def test_lcs_of_long_texts_keeps_memory_linear() -> None:
    left = [str(i % 97) for i in range(6000)]
    right = [str(i % 89) for i in range(6000)]
    tracemalloc.start()
    length = lcs_length(left, right)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < length <= 6000
    assert peak < 3_000_000  # a table of 6000 x 6000 would be 36 million cells


@given(some_tokens)
def test_equal_texts_score_one(text: list[str]) -> None:
    assert rouge_n(text, text, 1) == rouge_l(text, text) == 1.0
    assert bleu_4(text, text) == pytest.approx(1.0)


@given(tokens, tokens)
def test_scores_stay_between_zero_and_one(answer: list[str], expected: list[str]) -> None:
    for value in (bleu_4(answer, expected), rouge_l(answer, expected), rouge_n(answer, expected, 2)):
        assert 0.0 <= value <= 1.0 + 1e-12


def test_nothing_in_common_or_no_answer_scores_zero() -> None:
    assert bleu_4([], ["a"]) == rouge_l([], ["a"]) == rouge_n([], ["a"], 1) == 0.0
    assert bleu_4(["b"], ["a"]) == rouge_l(["b"], ["a"]) == 0.0


def test_repeating_a_right_word_does_not_pay() -> None:
    assert rouge_n(["保修"] * 5, ["保修", "期"], 1) == pytest.approx(2 * 1 / (5 + 2))


@given(st.text())
@settings(max_examples=300)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_width_case_and_space_do_not_matter() -> None:
    assert tokenise("ＡＢＣ　保修３６个月！") == tokenise("abc \n保修36个月!")
    assert all(token.strip() for token in tokenise("a \t b\u3000c"))


def test_mixed_text_is_cut_like_jieba_cuts_it() -> None:
    text = "冰箱 refrigerator 保修36个月, ok"
    assert tokenise(text) == " ".join(jieba.cut(text)).split()


def test_words_that_a_program_adds_to_jieba_do_not_change_scores() -> None:
    before = tokenise("青禾冰箱整机")
    jieba.add_word("青禾冰箱整机")
    try:
        assert tokenise("青禾冰箱整机") == before
    finally:
        jieba.del_word("青禾冰箱整机")


def test_every_metric_of_the_settings_is_scored_and_no_other() -> None:
    assert (*SCORERS, BERT_SCORE, TOKEN_PROBABILITY) == METRICS
    pairs = [Pair("保修36个月", "保修36个月", ("36个月",)), Pair('{"a": 1}', '{"a": 1}')]
    text, data = score_all(pairs, METRICS, Letters())
    assert set(text) | set(data) == set(METRICS) - {TOKEN_PROBABILITY}  # which asks the model, in evaluate
    assert set(data) - set(text) == {"json_valid", "json_equal"}


class Letters:
    """An encoder of characters: equal ones have equal vectors, slightly too long, as rounding makes them."""

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Vectors:
        tokens = ["[", *text, "]"]
        vectors = np.stack([np.random.default_rng(ord(c)).normal(size=16) for c in tokens])
        vectors *= 1.000001 / np.linalg.norm(vectors, axis=1, keepdims=True)
        is_mark = np.array([True, *[False] * len(text), True])
        return Vectors(tuple(map(ord, tokens)), vectors, is_mark)

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def test_bert_score_is_f1_within_0_and_1_of_the_answers_that_have_an_expected_text() -> None:
    pairs = [Pair("36个月", "三十六个月"), Pair("36", " ", ("36",)), Pair("好", "好"), Pair("", "好")]
    partly, none, same, empty = score_all(pairs, ["bert_score"], Letters())
    assert partly == {"bert_score": bert_scores([("36个月", "三十六个月")], Letters())[0].f1}
    assert 0.2 < partly["bert_score"] < 0.9
    assert (none, same, empty) == ({}, {"bert_score": 1.0}, {"bert_score": 0.0})


def test_metrics_that_do_not_apply_are_left_out() -> None:
    assert set(score(Pair("a", "a"), METRICS)) == {
        "rouge_1", "rouge_2", "rouge_l", "bleu_4", "language_match", "refusal_match",
    }  # fmt: skip
    assert set(score(Pair("36", "", ("36",)), METRICS)) == {"exact_facts", "fact_share"}


def test_share_of_facts() -> None:
    pair = Pair("保修36个月，15天内可退", "", ("36个月", "15天", "免运费"))
    assert score(pair, ["exact_facts", "fact_share"]) == {"exact_facts": 0.0, "fact_share": pytest.approx(2 / 3)}
    assert pair.missing == ("免运费",)
