"""What may not change when a question is reworded is found, and a change of it is noticed."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.spans import KINDS, breach, protected_spans


def _found(text: str, *facts: str) -> list[tuple[str, str]]:
    return [(text[s.start : s.end], s.kind) for s in protected_spans(text, facts)]


def _of(kind: str, text: str) -> list[str]:
    return [piece for piece, found in _found(text) if found == kind]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("一共1,024个", ["1,024个"]),
        ("全角３天", ["３天"]),
        ("保修三年半", ["三年半"]),
        ("涨了百分之五", ["百分之五"]),
        ("选第二个", ["第二个"]),
        ("下午三点开会", ["下午三点"]),
        ("2024-05-01下单", ["2024-05-01"]),
        ("只要¥99", ["¥99"]),
        ("便宜20%", ["20%"]),
        ("2024年5月1日下午三点半到", ["2024年5月1日", "下午三点半"]),
        ("8:30-17:00营业", ["8:30-17:00"]),
        ("三到五天发货", ["三到五天"]),
        ("三分之一", ["三分之一"]),
        ("两个半小时", ["两个半小时"]),
        ("等了半年", ["半年"]),
        ("拨打400-123-4567", ["400-123-4567"]),
        ("气温-5℃", ["-5℃"]),
        ("满200元减30元", ["200元", "30元"]),
        ("It takes twenty-five days, 3 weeks or $50.", ["twenty-five", "3 weeks", "$50"]),
        ("I waited half a day for the third one", ["half", "third one"]),
    ],
)
def test_numbers_with_their_units(text: str, numbers: list[str]) -> None:
    assert _of("number", text) == numbers


@pytest.mark.parametrize(
    "text", ["等一下", "一起去吧", "一定要买", "一般多久", "统一安排", "一共多少", "千万要记住", "一样吗"]
)
def test_words_that_only_look_like_numbers(text: str) -> None:
    assert _of("number", text) == []


@pytest.mark.parametrize(
    ("text", "negations"),
    [
        ("不能退货", ["不"]),
        ("没有发票", ["没"]),
        ("未拆封，无法开机", ["未", "无"]),
        ("别忘了，勿动，莫急，非人为", ["别", "勿", "莫", "非"]),
        ("I do not know, can't say, never did, without it, no way", ["not", "n't", "never", "without", "no"]),
        ("don’t", ["n’t"]),
    ],
)
def test_negations(text: str, negations: list[str]) -> None:
    assert _of("negation", text) == negations


@pytest.mark.parametrize(
    "text", ["能不能换", "可不可以", "有没有货", "非常好", "特别好", "不锈钢锅", "什么区别", "notice", "another"]
)
def test_words_that_deny_nothing(text: str) -> None:
    assert _of("negation", text) == []


@pytest.mark.parametrize(
    ("kind", "text", "piece"),
    [
        ("name", "张伟在吗", "张伟"),
        ("name", "寄到北京要几天", "北京"),
        ("quoted", "《桃花源记》的作者是谁", "《桃花源记》"),
        ("quoted", "什么叫“破釜沉舟”？", "“破釜沉舟”"),
        ("quoted", 'Explain "to be" to me', '"to be"'),
        ("sku", "型号KX-200怎么用", "KX-200"),
        ("sku", "报错A12B", "A12B"),
        ("url", "打开https://example.cn/a?b=1，然后呢", "https://example.cn/a?b=1"),
        ("url", "网址是shop.example.com吗", "shop.example.com"),
        ("email", "写信到kefu@example.com。", "kefu@example.com"),
        ("path", "文件/usr/local/a.txt打不开", "/usr/local/a.txt"),
        ("path", "放在C:\\data\\x里", "C:\\data\\x"),
        ("path", "怎么运行main.py", "main.py"),
        ("code", "`pip install x`是什么意思", "`pip install x`"),
        ("placeholder", "你好{name}", "{name}"),
        ("placeholder", "你好{{ x }}", "{{ x }}"),
        ("placeholder", "填<slot>吧", "<slot>"),
        ("placeholder", "一共%s件", "%s"),
        ("placeholder", "我叫[姓名]", "[姓名]"),
        ("placeholder", "打【手机号】", "【手机号】"),
        ("placeholder", "设$HOME", "$HOME"),
        ("placeholder", "She ____ home", "____"),
        ("formula", "用S=πr²吗", "S=πr²"),
        ("formula", "a²+b²=c²怎么用", "a²+b²=c²"),
        ("emoji", "好的😀", "😀"),
        ("emoji", "一家人👨‍👩‍👧", "👨‍👩‍👧"),
        ("name", "Does McDonald's ship to New York?", "New York"),
        ("name", "Is my iPhone covered?", "iPhone"),
        ("name", "Paris is big", "Paris"),
        ("name", "我的iPhone坏了", "iPhone"),
    ],
)
def test_each_kind(kind: str, text: str, piece: str) -> None:
    assert (piece, kind) in _found(text)
    assert kind in KINDS


def test_a_word_that_opens_an_english_sentence_is_no_name() -> None:
    assert _found("Can I return it? How do I pay? Please help. I'm waiting.") == []


def test_an_everyday_word_is_no_name() -> None:
    assert _found("谢谢，这里安静吗，可以换货吗") == []


def test_what_a_task_is_about_stands_after_its_colon() -> None:
    assert _found("概括成两句：旧铁路停运了。") == [("两句", "number"), ("旧铁路停运了。", "material")]
    assert _found("Sum up:\nIt rains.") == [("It rains.", "material")]
    assert _found("你好：") == []


def test_facts_of_the_row_are_protected() -> None:
    assert ("质保", "fact") in _found("内胆质保多久", "质保")
    assert _found("内胆漏水怎么办", "质保", " ") == []


def test_overlapping_pieces_are_one() -> None:
    assert _found("看《三年级语文》第2册") == [("《三年级语文》", "quoted"), ("第2册", "number")]


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("买3台", "买4台", "lost"),
        ("买3台", "买3台和3台", "doubled"),
        ("张伟找李娜", "李娜找张伟", "order"),
        ("能退吗", "不能退吗", "negation"),
        ("买冰箱", "买2台冰箱", "numbers"),
        ("不能退", "能退", "lost"),
        ("I can't go", "I can go", "lost"),
        ("Can I go", "Can I never go", "negation"),
    ],
)
def test_a_breach_is_named(before: str, after: str, reason: str) -> None:
    assert reason in (breach(before, protected_spans(before), after) or "")


@pytest.mark.parametrize(
    ("before", "after"), [("怎么买3台", "如何买3台"), ("你好", "您好"), ("不能马上退吗", "不能立刻退吗")]
)
def test_a_harmless_change_is_no_breach(before: str, after: str) -> None:
    assert breach(before, protected_spans(before), after) is None


_WORDS = "3天 不 没有 张伟 《三体》 KX-200 {name} %s 😀 ， 怎么 退货 x=1 `a` ' \" < [ a@b.cn How Apple —— ... / 半"
_PIECES = st.sampled_from([*_WORDS.split(), " ", "\n", "\u200d"])


@given(st.lists(_PIECES, max_size=12).map("".join) | st.text(max_size=40))
def test_spans_are_ordered_disjoint_and_kept_by_the_text_itself(text: str) -> None:
    spans = protected_spans(text, ["退货"])
    assert all(0 <= s.start < s.end <= len(text) for s in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert breach(text, spans, text) is None


def test_long_texts_cost_no_more_than_their_length() -> None:
    """A quadratic pattern would take minutes here; the test's time limit is the check."""
    for piece in ("a", "a.", "1-", "“", "{", "<a", "a/", "=", "a@", "\\", "一", "1", "[", "Aa ", "a ", "能不"):
        protected_spans(piece * 20_000)
