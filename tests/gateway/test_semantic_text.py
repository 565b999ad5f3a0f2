"""Questions that look alike and are not: none may be taken for another. And some that are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.gateway.semantic_text import MAX_CHARS, equal_numbers, telling

SAME = [
    ("How do I reset my password?", "how can I reset my password"),
    ("How do I reset my password?", "Could you please tell me how to reset my password? Thanks!"),
    ("How do I reset my password?", "Hello, how to reset my password, please?"),
    ("What is the warranty of the X200?", "what's the warranty of the X200"),
    ("Tell me the opening hours.", "Please let me know the opening hours"),
    ("Why can't I log in?", "Why can not I log in?"),
    ("怎么退货？", "请问如何退货"),
    ("怎么退货？", "您好，我想知道怎样退货呢？谢谢！"),
    ("保修期是多少天？", "请问保修期多少天？"),
    ("这个是啥", "这个是什么？"),
    ("ＡＢＣ１２３ 怎么用", "ABC123 如何用?"),
]

# Per class, pairs with one difference that changes the answer.
DIFFERENT = {
    "numbers": [
        ("Is the warranty 3 years?", "Is the warranty 5 years?"),
        ("What is 12 + 7?", "What is 12 + 8?"),
        ("Does 3.5 fit?", "Does 35 fit?"),
        ("Is -5 allowed?", "Is 5 allowed?"),
        ("Call 010-555", "Call 010-556"),
        ("Is it due on 2024-01-02?", "Is it due on 2024-02-01?"),
        ("Give me three examples", "Give me four examples"),
        ("保修三年吗", "保修五年吗"),
        ("第1章讲什么", "第2章讲什么"),
        ("满100减20怎么用", "满200减10怎么用"),
        ("7天内可以退货吗", "15天内可以退货吗"),
        ("一万元利息多少", "一百万元利息多少"),
        ("iPhone 15 多少钱", "iPhone 16 多少钱"),
    ],
    "units": [
        ("Is 5 km far?", "Is 5 m far?"),
        ("Is 10 % off?", "Is 10 off?"),
        ("Does it cost $5?", "Does it cost €5?"),
        ("Is 30 °C hot?", "Is 30 °F hot?"),
        ("5公斤运费多少", "5克运费多少"),
        ("三天到货吗", "三小时到货吗"),
        ("100元够吗", "100美元够吗"),
        ("Is it 5 MB?", "Is it 5 Mb?"),
    ],
    "negation": [
        ("Can I return it?", "Can't I return it?"),
        ("Why does it start?", "Why doesn't it start?"),
        ("Is it possible with a receipt?", "Is it possible without a receipt?"),
        ("Which are allowed?", "Which are not allowed?"),
        ("Do you never close?", "Do you ever close?"),
        ("可以退货吗", "不可以退货吗"),
        ("哪些商品能退", "哪些商品不能退"),
        ("没有发票能报销吗", "有发票能报销吗"),
        ("已付款怎么办", "未付款怎么办"),
        ("为什么会亮", "为什么不会亮"),
    ],
    "reversal": [
        ("Flights from Paris to London", "Flights from London to Paris"),
        ("Flights to Paris from London", "Flights from Paris to London"),
        ("Does the dog bite the man?", "Does the man bite the dog?"),
        ("Is A larger than B?", "Is B larger than A?"),
        ("Convert EUR to USD", "Convert USD to EUR"),
        ("Translate Chinese into English", "Translate English into Chinese"),
        ("Who paid before delivery?", "Who paid after delivery?"),
        ("从北京到上海的高铁", "从上海到北京的高铁"),
        ("张三借给李四多少钱", "李四借给张三多少钱"),
        ("人民币怎么换美元", "美元怎么换人民币"),
        ("猫追狗吗", "狗追猫吗"),
        ("甲比乙高吗", "乙比甲高吗"),
    ],
    "names": [
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("what is the capital of france", "what is the capital of spain"),
        ("Who is Li Lei?", "Who is Li Wei?"),
        ("Is alice there?", "Is bob there?"),
        ("Where is US data kept?", "Where is us data kept?"),
        ("Do you sell polish?", "Do you sell Polish?"),
        ("张三的电话多少", "李四的电话多少"),
        ("北京的天气怎么样", "南京的天气怎么样"),
        ("小米手机怎么样", "华为手机怎么样"),
        ("《红楼梦》的作者是谁", "《西游记》的作者是谁"),
        ("红色的有吗", "蓝色的有吗"),
    ],
    "quoted": [
        ('What does "ship" mean?', 'What does "shop" mean?'),
        ('What does "The end" mean?', 'What does "the end" mean?'),
        ("“行”怎么读", "“形”怎么读"),
        ("「你好」怎么说", "「您好」怎么说"),
        ("What does `rm -r` do?", "What does `rm -R` do?"),
        ("Translate “please” into Chinese", "Translate “thanks” into Chinese"),
        ('Translate "how to"', 'Translate "how can I"'),
        ("mail to a@b.com", "mail to a@b.cn"),
        ("open http://a.com/X", "open http://a.com/x"),
    ],
    "others": [
        ("How do I enable it?", "How do I disable it?"),
        ("How do I reset my router password?", "How do I reset my password?"),
        ("How do I cancel?", "Do I cancel?"),
        ("What is it?", "Where is it?"),
        ("Why reset?", "How to reset?"),
        ("Can you help my mother?", "Can you help my father?"),
        ("Is my password safe?", "Is your password safe?"),
        ("免费吗", "收费吗"),
        ("怎么开通", "怎么关闭"),
        ("男士的", "女士的"),
        ("怎么样", "怎么"),
        ("请假怎么办", "假怎么办"),
        ("他怎么了", "他怎么样"),
        ("a-b", "a+b"),
        ("x < y", "x > y"),
        ("How do you say thanks?", "How do you say please?"),
        ("谢谢怎么说", "你好怎么说"),
        ("怎么说谢谢", "怎么说"),
        ("hello in French", "hi in French"),
        ("Hello Kitty price", "Kitty price"),
        ("How do you feel?", "How do I feel?"),
        ("小的时候吃什么", "小时吃什么"),
        ("告诉我们在哪", "们在哪"),
        ("麻烦制造者是谁", "制造者是谁"),
        ("vitamin a benefits", "vitamin benefits"),
        ("Let me go", "go"),
        ("这是苹果吗", "这是苹果"),
        ("你呢", "你"),
        ("Will May come?", "Will may come?"),
    ],
}


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_says_the_same(one: str, other: str) -> None:
    assert telling(one) == telling(other) is not None


@pytest.mark.parametrize(
    ("one", "other"), [pair for pairs in DIFFERENT.values() for pair in pairs], ids=lambda text: text[:20]
)
def test_what_does_not(one: str, other: str) -> None:
    assert telling(one) != telling(other)


@pytest.mark.parametrize("kind", DIFFERENT)
@pytest.mark.parametrize("frame", ["{}", "Please tell me: {}", "请问{}谢谢", "{} thanks", "Hi, {}?"])
def test_no_frame_hides_the_difference(kind: str, frame: str) -> None:
    assert all(telling(frame.format(a)) != telling(frame.format(b)) for a, b in DIFFERENT[kind])


WORDS = ["not", "from", "to", "A", "B", "5", "km", "不", "到", "从", "张三", '"x"', "London", "before", "-3", "%"]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True), st.data())
def test_any_other_order_or_word_is_another_question(words: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(words) | st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True))
    same = telling(" ".join(words)) == telling(" ".join(other))
    assert same == (words == list(other))


@given(st.text(max_size=80))
def test_any_text_is_read(text: str) -> None:
    assert telling(text) == telling(text)


def test_long_and_empty_texts_tell_nothing() -> None:
    assert telling("x" * (MAX_CHARS + 1)) is None
    assert telling("") is telling("  ?! ") is None


def test_numbers_of_answers() -> None:
    assert equal_numbers("3 天或 5 天", "5 days or 3 days")
    assert not equal_numbers("3 天", "4 天")
