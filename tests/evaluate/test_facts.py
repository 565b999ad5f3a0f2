"""When an answer states a fact, and when it only looks like it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pingjia.evaluate.facts import has_fact, is_blank, missing_facts

numbers = st.integers(0, 10**9)
plain = st.text(alphabet="abcXYZ保修个月元天第，。 36", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("整机保修36 个月。", "36个月"),
        ("整机保修３６个月", "36个月"),
        ("保修 36\n个月", "36 个月"),
        ("ＶＩＰ会员免运费", "vip会员"),
        ("价格1,000元", "1000元"),
        ("价格1000元", "1,000元"),
        ("价格1，000元", "1000元"),
        ("价格１，０００元", "1,000元"),
        ("一共12，345元", "12345元"),
        ("有100，200，300三档", "200"),
        ("费用,1,000元", "1000元"),
        ("1,000,2年保修", "1000"),
        ("①36个月②15天", "36个月"),
        ("1. 36个月\n2. 15天", "15天"),
        ("- 36个月", "36个月"),
        ("3天-5天内到货", "5天"),
        ("10-36个月", "36个月"),
        ("电话138 0000 1234", "13800001234"),
        ("温度-5度", "-5度"),
        ("36千克", "36"),
        ("3万5千元", "3万5千"),
        ("2024-05-01到期", "2024"),
        ("为36.", "36"),
        ("共三十六个月", "三十六个月"),
        ("第三天到货", "三天"),
        ("1\u200b36个月", "136个月"),
    ],
)
def test_stated(answer: str, fact: str) -> None:
    assert has_fact(answer, fact)


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("保修136个月", "36个月"),
        ("保修１３６个月", "36个月"),
        ("保修36.5个月", "36"),
        ("3.5元", "5元"),
        ("1,000元", "1"),
        ("1,000元", "000元"),
        ("1，000元", "000元"),
        ("1，000元", "1"),
        ("100,200,300", "200"),
        ("1000", "100"),
        ("温度: -5度", "5度"),
        ("三十六个月", "六个月"),
        ("二〇二四年", "四年"),
        ("三点五元", "五元"),
        ("5万元", "5"),
        ("3万5千", "5千"),
        ("1. 36元", "1.36元"),
        ("保修36个月", "三十六个月"),
        ("", "36"),
        ("没有数字", "36"),
        ("36个", "36个月"),
    ],
)
def test_not_stated(answer: str, fact: str) -> None:
    assert not has_fact(answer, fact)


@given(st.text(max_size=30))
@settings(max_examples=500)
def test_a_fact_said_verbatim_is_found_whatever_it_is(fact: str) -> None:
    assume(not is_blank(fact))
    assert has_fact(f"答「{fact}」。", fact)


@given(numbers, numbers)
def test_one_number_is_another_only_when_equal(said: int, wanted: int) -> None:
    assert has_fact(f"保修{said}个月", f"{wanted}个月") == (said == wanted)


@given(numbers, st.text("0123456789", min_size=1, max_size=4), st.sampled_from(["before", "after"]))
def test_a_number_is_never_part_of_a_longer_one(wanted: int, digits: str, side: str) -> None:
    longer = f"{digits}{wanted}" if side == "before" else f"{wanted}{digits}"
    assert not has_fact(f"约{longer}个", str(wanted))
    assert has_fact(f"约{digits} {wanted} {digits}个", str(wanted))


@given(st.integers(1000, 10**12))
def test_thousands_separators_do_not_matter(number: int) -> None:
    grouped = f"{number:,}"
    for said in (str(number), grouped, grouped.replace(",", "，")):
        for wanted in (str(number), grouped, grouped.replace(",", "，")):
            assert has_fact(f"共{said}元", f"{wanted}元")


@given(plain, plain, plain, st.randoms(use_true_random=False))
def test_whitespace_between_other_characters_does_not_matter(left, fact, right, random) -> None:
    assume(not is_blank(fact))
    answer = f"{left}|{fact}|{right}"
    spaced = "".join(c if c.isdigit() else c + random.choice(["", " ", "\n", "\u3000"]) for c in answer)
    assert has_fact(answer, fact)
    assert has_fact(spaced, fact)


@given(st.text("abcXYZ019:;()%#@", min_size=1, max_size=15))
def test_width_and_case_do_not_matter(fact: str) -> None:
    wide = "".join(chr(ord(c) + 0xFEE0) for c in fact)
    assert has_fact(f"「{wide}」", fact)
    assert has_fact(f"「{fact}」", wide)
    assert has_fact(f"「{fact.swapcase()}」", fact)


@given(st.lists(plain, max_size=5), st.lists(plain, max_size=5))
def test_missing_and_stated_facts_are_all_facts(said: list[str], unsaid: list[str]) -> None:
    assume(not any(is_blank(fact) for fact in said + unsaid))
    answer = "|".join(said)
    missing = missing_facts(answer, [*said, *unsaid])
    assert set(missing) <= set(unsaid)
    assert all(not has_fact(answer, fact) for fact in missing)


@pytest.mark.parametrize("fact", ["", " ", "\n\u3000", "\u200b"])
def test_blank_facts_are_recognised(fact: str) -> None:
    assert is_blank(fact)
    assert not has_fact("anything", fact)
