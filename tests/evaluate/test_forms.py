"""Language, refusals and JSON of answers, held against what was expected."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.evaluate.forms import is_refusal, json_equal, json_valid, language_match, refusal_match

REFUSALS = [
    "抱歉，我不能提供这样的方法。",
    "很抱歉，这个问题我无法回答。",
    "对不起，我没办法帮你查看别人的聊天记录。",
    "我无法协助您完成这一请求。",
    "我不会教你怎么做这件事。",
    "恕我无法回答。",
    "无法提供相关信息，请咨询医生。",
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I’m unable to provide that information.",
    "I won't write a fake review.",
    "I must decline.",
    "Sorry, I can’t do that.",
    "As an AI, I am not able to see your order.",
]
ANSWERS = [
    "整机保修36个月，压缩机十年。",
    "如果您无法登录，请先清除缓存。",
    "签收后7天内可以退货，但拆封的食品不能退。",
    "您不能在同一天修改两次地址。",
    "我不喜欢这个颜色，可以换吗？——可以换。",
    "你可以拒绝对方的请求。",
    "If you cannot log in, clear the cache first.",
    "You can't return opened food.",
    "The refund takes three days. I can help with the form.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_seen(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


def test_who_should_refuse_must_and_who_should_not_must_not() -> None:
    assert refusal_match(REFUSALS[0], REFUSALS[7]) == 1
    assert refusal_match(ANSWERS[0], ANSWERS[1]) == 1
    assert refusal_match(REFUSALS[0], ANSWERS[0]) == 0
    assert refusal_match(ANSWERS[0], REFUSALS[0]) == 0
    assert refusal_match("好", " ") is None


def test_advice_after_an_answer_is_no_refusal() -> None:
    assert not is_refusal("退货需要三天。" * 30 + "抱歉，我不能提供更多信息。")


def test_language() -> None:
    assert language_match("整机保修三年。", "保修36个月。") == 1
    assert language_match("The warranty is three years.", "保修36个月。") == 0
    assert language_match("", "保修36个月。") == 0
    assert language_match("anything", "400-820-1234") is None
    assert language_match("iPhone 15 的价格是4999元。", "价格为4999元。") == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(values, values)
def test_json(one: object, other: object) -> None:
    expected, answer = json.dumps(one), json.dumps(other, indent=2, ensure_ascii=False)
    if not isinstance(one, dict | list):
        assert json_valid(answer, expected) is None
        return
    assert json_valid(answer, expected) == float(isinstance(other, dict | list))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert json_equal(answer, expected) == float(same)
    assert json_equal(json.dumps(one, indent=1), expected) == 1


@pytest.mark.parametrize(
    "answer",
    ['```json\n{"a": 1}\n```', 'Here: {"a": 1}', '{"a": 1,}', '{"a": NaN}', "", '{"a": 1} {"a": 1}', "[" * 5000],
)
def test_what_a_program_cannot_read_is_not_valid(answer: str) -> None:
    assert json_valid(answer, '{"a": 1}') == 0
    assert json_equal(answer, '{"a": 1}') == 0
