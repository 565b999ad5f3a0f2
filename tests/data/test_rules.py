"""Cheap rules: right when they speak. For every rule what it must find, and what looks like it and is sound."""

from __future__ import annotations

import pickle
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data import read_examples
from pingjia.data.rules import RULES, check_rules
from pingjia.types import Example, Message


def example(question: str, answer: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


def rules(question: str, answer: str, off: Collection[str] = ()) -> list[str]:
    return [finding.rule for finding in check_rules(example(question, answer), off)]


GOOD = (
    "青禾冰箱整机保修三十六个月，压缩机另外保修十年。"
    "保修期内的故障都免费上门维修，配件费也不收。发票或者订单截图都可以。"
)
LONG = "这是一个很长的回答，它在不停地重复同样的内容而没有给出任何新的信息，所以模型也会学会这样说下去，直到被截断"

# ---- repeated


@pytest.mark.parametrize(
    "answer",
    [
        "很好用" * 10,
        "故宫是一座宫殿，可以参观。" + "我们可以去参观。" * 8,
        "好的，" + "请稍等，" * 10,
        "The shop is open. " * 7,
        "啦" * 30,
        "。".join([LONG] * 6),
        "第一句在这里。第二句在那里。第三句在哪里。" * 6,
        GOOD + "谢谢您的咨询，" * 8,
        GOOD + "谢谢您的咨询，" * 8 + "谢谢您",
    ],
)
def test_answers_that_run_in_circles(answer: str) -> None:
    assert rules("介绍一下", answer, off={"language"}) == ["repeated"]


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        GOOD * 2,
        "哈哈哈哈哈哈，太好笑了",
        "I like it very much, " * 3 + "and so on",
        "圆周率不是3.3333333333333333333333333333333333333333",
        "\n".join(f"{i}. 步骤{i}：打开第{i}个开关" for i in range(1, 9)),
        "两只老虎，两只老虎\n跑得快，跑得快\n一只没有眼睛\n一只没有尾巴\n真奇怪，真奇怪",
        "|列|列|\n|---|---|\n" + "|1|2|\n" * 10,
        "\n".join(f"{day}：语文" for day in ("周一", "周二", "周三", "周四", "周五", "周六")),
        "1. ________________________________________\n2. ________________",
        "标题\n" + "-" * 40 + "\n内容说明在此",
        "休息\n" + "9:00-21:00\n" * 5 + "休息",
        "```\n" + "x = x + 1\n" * 10 + "```",
        "乘法表：\n" + "\n".join(" ".join(f"{a}×{b}={a * b}" for a in range(1, 10)) for b in range(1, 10)),
    ],
)
def test_lists_poems_and_tables_may_repeat(answer: str) -> None:
    assert rules("介绍一下", answer, off={"language"}) == []


@given(st.text("春夏秋冬山水花鸟", min_size=2, max_size=60), st.integers(12, 20))
def test_any_piece_said_a_dozen_times_is_found(piece: str, times: int) -> None:
    answer = piece * times
    if len(answer) >= 24:
        assert rules("写一句", answer) == ["repeated"]


@given(st.lists(st.integers(0x4E00, 0x6E00), min_size=2, max_size=300, unique=True))
def test_a_text_of_different_characters_never_repeats(characters: list[int]) -> None:
    assert "repeated" not in rules("写一段", "".join(map(chr, characters)))


# ---- refusal


@pytest.mark.parametrize(
    "answer",
    [
        "作为一个AI语言模型，我无法回答这个问题。",
        "作为一个人工智能助手，我没有个人情感，因此无法给出看法。",
        "作为AI，我不能提供医疗建议，请咨询医生。",
        "我只是一个语言模型，无法提供相关内容。",
        "作为一个大型语言模型，我没有能力查看图片。",
        "抱歉，我无法回答这个问题。",
        "很抱歉，我无法提供您所需的信息。",
        "对不起，我不能协助您完成这个请求。",
        "I'm sorry, but I can't assist with that.",
        "I'm sorry, but I cannot fulfill this request.",
        "Sorry, I can’t help with that.",
        "I cannot help with that request.",
        "I apologize, but I'm not able to provide that information.",
        "As an AI language model, I don't have personal opinions.",
        "As a large language model, I am unable to browse the internet.",
    ],
)
def test_stock_refusals(answer: str) -> None:
    assert "refusal" in rules("能帮我吗 can you help", answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("能退吗", "很抱歉，该商品暂不支持退货。"),
        ("能退吗", "很抱歉，定制商品无法办理退货，不过可以换货。"),
        ("能送吗", "抱歉，我们目前无法提供送货上门服务，您可以到店自提。"),
        ("能查吗", "很抱歉，系统维护中，暂时无法查询您的订单，请一小时后再试。"),
        ("能修吗", "非常遗憾，超过保修期的机器我们不能免费处理，可以先报价。"),
        ("can I return it", "Sorry, we cannot provide refunds for opened software."),
        ("do you ship there", "I'm sorry, we can't ship to PO boxes, but we can ship to your office."),
        ("你是谁", "我是青禾商城的智能助手，可以帮您查询订单、办理退换货。"),
        ("你是AI吗", "是的，我是一个人工智能助手，能回答关于产品的问题。"),
        ("AI拒答时怎么说", "常见的说法是“作为一个AI语言模型，我无法回答”。"),
        ("什么是语言模型", "语言模型是一种统计模型，它无法访问训练之外的数据。"),
        ("Explain retrieval to me", "An AI cannot access data it was not trained on. That is why retrieval helps."),
        ("写机器人的台词", "“我是一个聊天机器人，无法完成爱你这件事。”他说。"),
        ("画个表", "作为一个语言模型，我无法直接生成图片，" + "但可以这样做：" + GOOD + LONG + GOOD + LONG),
    ],
)
def test_a_shop_that_says_no_and_talk_about_refusals(question: str, answer: str) -> None:
    assert rules(question, answer) == []


# ---- markup


@pytest.mark.parametrize(
    "answer",
    [
        "先这样：\n```python\nprint(1)\n",
        "这是<b>重点，请注意。",
        "这是重点</b>，请注意。",
        '<div class="a">一段<span>文字</div>',
        "价格&nbsp;99元",
        "甲&amp;乙联名款",
        "亲爱的{{name}}，您好",
        "亲爱的${name}，您好",
        "您好<|im_end|>",
        "您好</s>",
        "[gMASK]您好",
        "ä½\xa0å¥½ï¼Œæ¬¢è¿Ž",
        "你好，欢迎光临".encode().decode("latin-1"),
        "你好，欢迎光临".encode("gbk").decode("latin-1"),
        "你好，欢迎光临。谢谢！".encode()[:30].decode("gbk", "replace"),
        "It doesnâ€™t work well",
        "cafÃ© au lait",
        "锟斤拷锟斤拷",
        "你好\ufffd\ufffd",
        "勾股定理：$$a^2+b^2=c^2",
    ],
)
def test_damaged_text(answer: str) -> None:
    assert rules("介绍一下", answer, off={"language"}) == ["markup"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("怎么打开", "先这样：\n```\nls\n```\n再这样。"),
        ("介绍", "这是<b>重点</b>，请<p>注意。"),
        ("勾股定理", "勾股定理：$$a^2+b^2=c^2$$。"),
        ("贵吗", "在点评上标的是$$，不算贵。"),
        ("比较", "如果 a<b 且 b>c，则成立"),
        ("compare", "It holds if a <b and b> c, so it does."),
        ("HTML里空格怎么写", "用&nbsp;表示空格，用<b>加粗。"),
        ("写一个邮件模板", "亲爱的{{name}}，您好"),
        ("什么是锟斤拷", "“锟斤拷”是编码错误产生的文字。"),
        ("这个\ufffd是什么", "\ufffd 是替换字符。"),
        ("法语怎么写", "Les élèves naïfs à l'école ont été déçus, où ça ?"),
        ("德语字母", "ä、ö、ü、ß；Äpfel, Öl, Übermut"),
        ("号码", "尾号××××××1234，25°C±2"),
        ("越南语", "Bao giờ hàng về đến nơi? Tôi muốn trả hàng."),
        ("破折号", "这是——“引号”…‘单引号’€5™"),
    ],
)
def test_sound_text_with_signs_in_it(question: str, answer: str) -> None:
    assert "markup" not in rules(question, answer)


@given(st.text(st.characters(blacklist_characters="\ufffd", max_codepoint=0x024F, min_codepoint=0x20), max_size=80))
def test_accents_between_plain_letters_are_no_damage(text: str) -> None:
    answer = " ".join(c for c in text if c.isalpha())
    assert "markup" not in rules("写几个字母", answer)


# ---- echo


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("冰箱保修多久？", "冰箱保修多久？"),
        ("冰箱保修多久？", "冰箱保修多久"),
        ("冰箱保修多久？", "冰箱保修多久？冰箱保修多久？"),
        ("冰箱保修多久？", "您问的是：冰箱保修多久？"),
        ("How long is the warranty?", "how long is the warranty"),
        ("How long is the warranty?", "You asked: How long is the warranty?"),
    ],
)
def test_answers_that_are_the_question(question: str, answer: str) -> None:
    assert rules(question, answer) == ["echo"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("你好", "你好！"),
        ("谢谢", "谢谢"),
        ("新年快乐！", "新年快乐！"),
        ("Good morning", "Good morning!"),
        ("请重复：你好吗朋友", "请重复：你好吗朋友"),
        ("冰箱保修多久", "冰箱保修多久？三年。"),
        ("润色：今天天气很好。", "润色：今天天气很好。"),
    ],
)
def test_greetings_and_what_shall_be_repeated(question: str, answer: str) -> None:
    assert rules(question, answer) == []


def test_what_a_tool_says_may_be_said_again() -> None:
    said = "现在是北京时间九点整"
    turns = ("user", "现在几点"), ("assistant", "查一下"), ("tool", said), ("assistant", said)
    assert check_rules(Example(tuple(Message(role, text) for role, text in turns))) == []


# ---- language


@pytest.mark.parametrize(
    ("question", "answer", "langs"),
    [
        ("冰箱保修多久？", "The warranty is three years from the day you bought it.", ("zh", "en")),
        ("How long is the warranty of the fridge?", "青禾冰箱整机保修三十六个月。", ("en", "zh")),
        ("冰箱多少钱", "こちらの冷蔵庫は二千元です。", ("zh", "ja")),
        (
            "What is the refund policy of this?",
            "Vous pouvez retourner le produit sous quinze jours.",
            ("en", "fr"),
        ),
    ],
)
def test_answers_in_another_language(question: str, answer: str, langs: tuple[str, str]) -> None:
    (finding,) = check_rules(example(question, answer))
    assert (finding.rule, finding.field) == ("language", "response")
    assert finding.reason == f"the question is in {langs[0]}, the answer in {langs[1]}"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("请用英文写一封邮件", "Dear customer, thank you for your order and your patience."),
        ("translate to Chinese: hello my friend", "你好，我的朋友，见到你很高兴"),
        ("‘谢谢’用日语怎么说？", "ありがとうございます"),
        ("把下面的话译出来：今天很冷", "It is very cold today, my friend."),
        ("iPhone 15 的处理器是什么？", "Apple A16 Bionic"),
        ("列出四张披头士专辑", "Abbey Road, Revolver, Rubber Soul, Help"),
        ("写出反应式", "NaCl + AgNO3 -> AgCl + NaNO3"),
        ("给个命令", "sudo apt-get install python3 python3-pip"),
        ("这段代码输出什么", "hello world this is fine"),
        ("官网是多少", "https://www.example.com/support/contact"),
        ("What does 你好 mean?", "你好就是问候的意思，很常用。"),
        ("我想 cancel 我的 order", "可以的，请把单子给我看一下。"),
        ("12345", "请问有什么可以帮您的吗？"),
        ("refund?", "您好，请问要退哪一件商品？ Which one?"),
    ],
)
def test_answers_that_are_meant_to_be_in_another_language(question: str, answer: str) -> None:
    assert "language" not in rules(question, answer)


def test_the_language_asked_for_earlier_counts() -> None:
    turns = ("user", "以后都用英文回答"), ("assistant", "好的，没问题。"), ("user", "冰箱保修多久？")
    answer = Message("assistant", "The warranty is three years from the day you bought it.")
    assert check_rules(Example((*(Message(role, text) for role, text in turns), answer))) == []


# ---- all of them


def test_rules_can_be_switched_off() -> None:
    bad = example("冰箱保修多久？", "Sorry, I can't help with that.<|im_end|>")
    assert [f.rule for f in check_rules(bad)] == ["refusal", "markup", "language"]
    assert [f.rule for f in check_rules(bad, {"markup", "language"})] == ["refusal"]
    assert check_rules(bad, RULES.keys()) == []


def test_findings_cross_processes() -> None:
    (finding,) = check_rules(example("冰箱保修多久？", "冰箱保修多久"))
    assert pickle.loads(pickle.dumps(finding)) == finding


@given(st.text(max_size=200), st.text(max_size=400))
def test_nothing_makes_a_rule_fail(question: str, answer: str) -> None:
    check_rules(example(question, answer))


@pytest.mark.parametrize("name", ["customer_service", "tutoring", "writing"])
def test_the_samples_are_clean(name: str) -> None:
    files = [f"samples:{name}.jsonl", f"samples:{name}.heldout.jsonl"]
    rows = list(read_examples(files, on_problem=lambda problem: pytest.fail(str(problem))))
    assert len(rows) > 100
    assert [(row.where, check_rules(row)) for row in rows if check_rules(row)] == []
