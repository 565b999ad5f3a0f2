"""Which language a text is in: short questions, product names in them, code and links around them."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia import language
from pingjia.errors import DataError
from pingjia.language import LATIN, asks_for_other_language, identify

TEXTS = {
    "en": "refund?|hi|OK|iPhone 15 price|return policy|size M|is it waterproof|battery life?|no|sure|ASAP pls|"
    "do u ship to canada|COVID-19 vaccine|La La Land tickets|café nearby|résumé template|Beyoncé album|define osmosis|"
    "Salmon en croute recipe|Le Creuset pot|per diem|Los Angeles weather|who wrote Hamlet|Is it dishwasher safe?|A",
    "zh": "你好|好|多少钱|iPhone 15 多少钱|MacBook Pro 和 MacBook Air 有什么区别|Windows 10 怎么激活 Office|"
    "電子發票何時寄出|"
    "請問什麼時候發貨|Hello怎么读|WiFi密码是多少|HTTP 404 是什么意思|天気|苹果 iPhone 15 Pro Max 256GB 钛金属|"
    "3×4等于几|T恤有XL吗|鲜の果汁多少钱|价格是$99和$199|如果 a<b 且 b>c 那么|〇|"
    '“do away with”是什么意思|把"she walks to the shop"改成过去式',
    "mixed": "我想 cancel 我的 order|Can you tell me 这个多少钱|My package 还没到 what should I do|"
    "please 帮我 check 一下 my order status|I bought 一个冰箱 last week, 但是 it doesn't work",
    "und": "12345|😀😀|...|！！！|3.14 + 2 = ?|100%|2023-10-12||   ",
    "ja": "こんにちは|東京の天気|返品したいです|カメラ|iPhone 15 Pro Max 256GB はいくらですか|営業時間を教えてください",
    "ko": "안녕하세요|iPhone 15 Pro Max 가격이 얼마예요|반품하고 싶어요",
    "ru": "Привет|Где мой заказ?|Сколько стоит iPhone 15?",
    "fr": "Bonjour|merci beaucoup|Où est ma commande ?|Je voudrais retourner cet article|Combien ça coûte ?",
    "de": "Guten Tag|Danke schön|Wie viel kostet das?|Ich möchte das zurückgeben|Wo ist meine Bestellung?",
    "es": "Hola|muchas gracias|¿Dónde está mi pedido?|Necesito una factura por favor|Quiero devolver este producto",
    "vi": "Xin chào|Tôi muốn trả hàng",
    "ar": "مرحبا كيف حالك",
    "th": "สวัสดีครับ",
    "hi": "नमस्ते आप कैसे हैं",
}


@pytest.mark.parametrize(("lang", "text"), [(lang, text) for lang, texts in TEXTS.items() for text in texts.split("|")])
def test_short_texts(lang: str, text: str) -> None:
    found = identify(text)
    assert found.lang == lang
    assert 0 <= found.confidence <= 1


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("```python\nprint('hello my friend')\n```", "und"),
        ("`ls -l`", "und"),
        ("https://example.com/where/is/my/order", "und"),
        ("这个怎么运行\n```python\nfor line in the_file: print(line)\n```", "zh"),
        ("打开 https://example.com/how/to/return/it怎么退货", "zh"),
        ("写到 some.body@example.com 可以吗", "zh"),
        ("解方程 $\\frac{a}{b}+\\sqrt{x}=2$，怎么做", "zh"),
        ("How do I run `打印` here?", "en"),
        ("<div class='问题'>Where is my order?</div>", "en"),
    ],
)
def test_code_links_and_tags_do_not_count(text: str, lang: str) -> None:
    assert identify(text).lang == lang


def test_the_share_of_chinese() -> None:
    assert identify("你好ab").zh_share == 0.5
    assert identify("12").zh_share == 0
    assert identify("東京の").zh_share == pytest.approx(2 / 3)


@given(st.text("的一是不了人我在有他这为之大来以个中上们", min_size=1, max_size=50))
def test_chinese_characters_alone_are_chinese(text: str) -> None:
    assert identify(text) == language.Language("zh", 1.0, 1.0)


@given(st.text(max_size=120))
def test_any_text_has_a_language(text: str) -> None:
    found = identify(text)
    assert 0 <= found.confidence <= 1
    assert 0 <= found.zh_share <= 1
    assert found == identify(text)


def test_long_texts_without_a_space_take_no_time() -> None:
    """An address was looked for from every place to the end: 60,000 characters took minutes."""
    assert identify("很长的文字没有空格" * 20_000).lang == "zh"
    assert identify("x" * 200_000 + "@").lang in LATIN


@pytest.mark.parametrize(
    "question",
    ["翻译成英文", "用日语怎么说", "把它译出来", "葡萄牙语的谢谢", "Say it in French", "pinyin of 你", "英译汉"],
)
def test_questions_about_language(question: str) -> None:
    assert asks_for_other_language(question)


@pytest.mark.parametrize("question", ["冰箱保修多久", "Where is my order?", "文章写好了吗", "英雄是谁", "语气太重"])
def test_questions_about_other_things(question: str) -> None:
    assert not asks_for_other_language(question)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("py3langid"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    language._classifier.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs py3langid: pip install py3langid"):
        identify("Wer reitet so spät durch Nacht und Wind")
    language._classifier.cache_clear()
    assert identify("这个多少钱").lang == "zh"  # needs no model
    assert identify("How do I return this to you?").lang == "en"
