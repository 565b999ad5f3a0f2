"""Rows over the limit: what is kept fits, ends as it did, and nothing is lost without being named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.length import CUT_MARK, MIN_QUESTION, Policy, fit
from pingjia.types import Example, Message

WORDS = [
    "请问",
    "这台",
    "冰箱",
    "保修",
    "多久",
    "？",
    "the",
    "order",
    "12",
    "has",
    "not",
    "come",
    "谢谢",
    "您好",
    "因为",
    "天气",
    "很",
    "热",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Tokenizer) -> Tokenizer:
    return smollm2


def example_of(*turns: str, system: str = "", **extras: object) -> Example:
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], text) for i, text in enumerate(turns)]
    head = [Message("system", system)] if system else []
    return Example(messages=(*head, *messages), where="a.jsonl:7", **extras)  # type: ignore[arg-type]


def words(count: int) -> str:
    return " ".join(WORDS[i % len(WORDS)] for i in range(count))


def size(example: Example, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode_example(example).ids)


@pytest.mark.parametrize("policy", ["drop", "truncate-prompt", "split-turns"])
def test_a_row_that_fits_is_left_alone(tokenizer: Tokenizer, policy: Policy) -> None:
    example = example_of("你好", "您好，请讲。")
    exact = size(example, tokenizer)
    fitted = fit(example, tokenizer, exact, policy)
    assert fitted.kept == ((example, exact),)
    assert not fitted.lost
    assert not fitted.changes


def test_one_token_too_many_is_dropped_and_says_the_numbers(tokenizer: Tokenizer) -> None:
    example = example_of(words(50), "好的。")
    exact = size(example, tokenizer)
    fitted = fit(example, tokenizer, exact - 1, "drop")
    assert not fitted.kept
    assert [f.rule for f in fitted.lost] == ["length"]
    assert f"{exact:,} tokens, over cutoff_len {exact - 1:,}" in fitted.lost[0].reason


def test_the_question_loses_its_middle_and_the_answer_nothing(tokenizer: Tokenizer) -> None:
    question = "任务：概括下文。" + words(400) + "以上就是全文。"
    example = example_of(question, "这是概括。", facts=("概括",), reference="参考")
    ((short, tokens),) = fit(example, tokenizer, 200, "truncate-prompt").kept
    assert tokens == size(short, tokenizer) <= 200
    assert short.response == example.response
    assert short.prompt[-1].content.startswith("任务：概括下文。")
    assert short.prompt[-1].content.endswith("以上就是全文。")
    assert CUT_MARK in short.prompt[-1].content
    assert (short.facts, short.reference, short.where) == (example.facts, example.reference, example.where)


def test_as_much_of_the_question_is_kept_as_fits(tokenizer: Tokenizer) -> None:
    """With one more character it would be over the limit, give or take what one character costs."""
    ((_, tokens),) = fit(example_of("字" * 3000, "好。"), tokenizer, 300, "truncate-prompt").kept
    assert 295 <= tokens <= 300


def test_the_oldest_turns_go_first(tokenizer: Tokenizer) -> None:
    example = example_of(words(60), "一。", words(60), "二。", "最后的问题？", "三。", system="你是客服。")
    limit = size(replace(example, messages=(example.messages[0], *example.messages[3:])), tokenizer)
    fitted = fit(example, tokenizer, limit, "truncate-prompt")
    ((short, tokens),) = fitted.kept
    assert tokens == limit
    assert [m.content for m in short.messages] == [
        example.messages[0].content,
        *[m.content for m in example.messages[3:]],
    ]
    assert "the 1 oldest turns left out" in fitted.changes[0].reason


def test_an_answer_over_the_limit_is_never_cut(tokenizer: Tokenizer) -> None:
    for policy in ("drop", "truncate-prompt", "split-turns"):
        fitted = fit(example_of("讲个故事", words(300)), tokenizer, 100, policy)  # type: ignore[arg-type]
        assert not fitted.kept
        assert fitted.lost[0].rule == "length"


def test_splitting_keeps_every_turn_once_and_facts_with_the_last(tokenizer: Tokenizer) -> None:
    turns = [text for i in range(9) for text in (f"问题{i}：{words(20)}", f"答案{i}。")]
    example = example_of(*turns, system="你是客服。", facts=("答案8",), reference="参考")
    fitted = fit(example, tokenizer, 180, "split-turns")
    assert not fitted.lost
    assert len(fitted.kept) > 1
    parts = [part for part, _ in fitted.kept]
    assert [m.content for part in parts for m in part.messages[1:]] == turns
    assert all(part.messages[0].role == "system" for part in parts)
    assert all(tokens == size(part, tokenizer) <= 180 for part, tokens in fitted.kept)
    assert [part.facts for part in parts] == [()] * (len(parts) - 1) + [("答案8",)]
    assert [part.where for part in parts] == [f"a.jsonl:7~part{i}" for i in range(1, len(parts) + 1)]


def test_a_round_that_never_fits_is_named_and_the_others_stay(tokenizer: Tokenizer) -> None:
    example = example_of("一", "甲。", words(400), "乙。", "三", "丙。")
    fitted = fit(example, tokenizer, 100, "split-turns")
    assert [m.content for part, _ in fitted.kept for m in part.messages if m.role == "user"] == ["一", "三"]
    assert "question and answer 2 alone" in fitted.lost[0].reason


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=5),
    cutoff=st.integers(20, 160),
    policy=st.sampled_from(["drop", "truncate-prompt", "split-turns"]),
)
def test_whatever_comes_out_fits_and_ends_as_an_answer(
    tokenizer: Tokenizer, lengths: list[tuple[int, int]], cutoff: int, policy: Policy
) -> None:
    example = example_of(*(words(n) for pair in lengths for n in pair))
    fitted = fit(example, tokenizer, cutoff, policy)
    assert fitted.kept or fitted.lost
    answers = {m.content for m in example.messages if m.role == "assistant"}
    for part, tokens in fitted.kept:
        encoded = tokenizer.encode_example(part)
        assert len(encoded.ids) == tokens <= cutoff
        assert encoded.ids[-1] in tokenizer.stop_ids
        assert encoded.learn[-1]
        assert {m.content for m in part.messages if m.role == "assistant"} <= answers
    if policy == "truncate-prompt" and not fitted.kept:
        shortest = example_of("字" * (MIN_QUESTION + len(CUT_MARK)), example.response)
        assert size(shortest, tokenizer) + MIN_QUESTION > cutoff or len(example.prompt[-1].content) <= MIN_QUESTION
