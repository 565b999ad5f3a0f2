"""Signatures and what is found with them, against comparing every pair."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.duplicates import (
    SHINGLE,
    Signatures,
    _must_agree,
    find_exact,
    find_leaks,
    find_near,
    signature,
    similarity,
)
from pingjia.types import Example, Message

ALPHABET = (
    "冰箱洗衣机保修退货发票门店客服时间价格快递安装维修电话地址多少什么怎么可以需要请问您好谢谢的了是在我你们吗呢"
)


def row(question: str, answer: str = "好的，没问题。") -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


def signatures(*rows: Example) -> Signatures:
    return Signatures.of([signature(r) for r in rows])


def near(*rows: Example, threshold: float = 0.85) -> list[int]:
    made = signatures(*rows)
    return find_near(made, threshold, np.ones(len(rows), bool)).tolist()


def sentence(chance: random.Random, size: int = 80) -> str:
    return "".join(chance.choice(ALPHABET) for _ in range(size))


def jaccard(left: Example, right: Example) -> float:
    """By its definition, over the shingles of the letters."""

    def shingles(r: Example) -> set[str]:
        text = "".join(c for c in "".join(m.content for m in r.messages) if c.isalnum())
        return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}

    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def test_exact_looks_through_width_case_and_space() -> None:
    rows = [
        row("How much is the Kettle?"),
        row("how  much is the kettle?"),
        row("Ｈow much is the kettle?"),
        row("How?"),
    ]
    assert find_exact(signatures(*rows)).tolist() == [-1, 0, 0, -1]


@pytest.mark.parametrize(("left", "right"), [("3.5 元", "35 元"), ("a b", "ab"), ("不要", "要"), ("？", "！")])
def test_exact_is_not_blind_to_meaning(left: str, right: str) -> None:
    assert find_exact(signatures(row(left), row(right))).tolist() == [-1, -1]


def test_roles_and_turns_count() -> None:
    plain = row("a", "b")
    system = Example((Message("system", "s"), *plain.messages))
    longer = Example((*plain.messages, *plain.messages))
    assert find_exact(signatures(plain, system, longer)).tolist() == [-1, -1, -1]


@given(st.lists(st.integers(0, 8), max_size=40))
def test_exact_equals_a_dictionary(numbers: list[int]) -> None:
    expected, seen = [], {}
    for i, n in enumerate(numbers):
        expected.append(seen.get(n, -1))
        seen.setdefault(n, i)
    assert find_exact(signatures(*(row(f"问题{n}") for n in numbers))).tolist() == expected


TWO_FACTS = [
    ("冰箱整机保修三年，压缩机保修十年，凭发票到店办理。", "三年", "五年"),
    ("这款水壶可以放进洗碗机清洗，使用前请阅读说明书。", "可以", "不可以"),
    ("Delivery to the city takes 2 days from the day you order.", "2 days", "4 days"),
    ("You can return it within the warranty period at any of our stores.", "can", "cannot"),
]


@pytest.mark.parametrize(("text", "old", "new"), TWO_FACTS)
def test_rows_that_differ_by_a_number_or_a_no_are_never_near(text: str, old: str, new: str) -> None:
    assert near(row(text * 3), row(text.replace(old, new, 1) + text * 2), threshold=0.3) == [-1, -1]


def test_small_changes_of_wording_are_near() -> None:
    text = "我们的门店每天都开门，欢迎您带着发票来办理退货手续，工作人员会帮您检查商品，然后把款项退回原来的账户。"
    assert near(row(text), row(text.replace("欢迎您", "欢迎")), row(text + "谢谢")) == [-1, 0, 0]


def test_common_words_with_one_in_them_are_no_numbers() -> None:
    assert _must_agree("请问一下有一些优惠吗") == _must_agree("请问有优惠吗")
    assert _must_agree("保修一年") != _must_agree("保修两年")


def test_the_estimate_is_near_the_true_similarity() -> None:
    chance = random.Random(3)
    errors = []
    for _ in range(200):
        text = sentence(chance, 120)
        cut = chance.randint(0, 110)
        left, right = row(text), row(text[: 120 - cut] + sentence(chance, cut))
        made = signatures(left, right)
        errors.append(float(similarity(made.minhash[:1], made.minhash[1:])[0]) - jaccard(left, right))
    assert abs(float(np.mean(errors))) < 0.01
    assert float(np.std(errors)) < 0.045  # the binomial one for 128 values is 0.044 at most


def test_near_against_comparing_every_pair() -> None:
    """Planted copies with 0 to 12 changed characters among rows that have nothing to do with each other."""
    chance = random.Random(5)
    rows: list[Example] = []
    for _ in range(60):
        text = sentence(chance, 100)
        for _ in range(chance.randint(1, 4)):
            changed = list(text)
            for _ in range(chance.choice([0, 1, 2, 8, 12])):
                changed[chance.randrange(100)] = chance.choice(ALPHABET)
            rows.append(row("".join(changed)))
    chance.shuffle(rows)
    found = np.array(near(*rows, threshold=0.8)) >= 0
    sure = [any(found[j] == 0 and jaccard(rows[i], rows[j]) > 0.88 for j in range(i)) for i in range(len(rows))]
    never = [all(jaccard(rows[i], rows[j]) < 0.68 for j in range(i)) for i in range(len(rows))]
    assert sum(sure) > 20
    assert sum(never) > 50
    assert all(found[i] for i in range(len(rows)) if sure[i])
    assert not any(found[i] for i in range(len(rows)) if never[i])


def test_a_chain_loses_its_middle_only() -> None:
    """A ~ B ~ C with A and C apart: B goes, and C, which is near nothing that stays, stays."""
    chance = random.Random(9)
    text = sentence(chance, 300)
    a, b, c = text[:200], text[25:225], text[50:250]
    links = [jaccard(row(x), row(y)) for x, y in ((a, b), (b, c), (a, c))]
    assert links[0] > 0.72
    assert links[1] > 0.72
    assert links[2] < 0.66
    assert near(row(a), row(b), row(c), threshold=0.69) == [-1, 0, -1]


def test_rows_that_are_out_do_not_take_part() -> None:
    made = signatures(row("同一句话同一句话"), row("同一句话同一句话"), row("同一句话同一句话"))
    assert find_near(made, 0.8, np.array([False, True, True])).tolist() == [-1, -1, 1]


def test_a_bucket_of_thousands_is_no_trouble() -> None:
    made = Signatures.of([signature(row("同一句话说了很多很多遍"))] * 3000)
    assert find_near(made, 0.85, np.ones(3000, bool)).tolist() == [-1] + [0] * 2999


def test_leaks_of_every_kind_and_no_other() -> None:
    chance = random.Random(2)
    text = sentence(chance, 120)
    held_out = signatures(row("冰箱多少钱？", "两千元。"), row(text, "是的。"), row("别的问题", "别的答案"))
    rows = signatures(
        row("冰箱多少钱？", "两千元。"),
        row("冰箱多少钱？", "三千元。"),
        row(text + "吗", "是的。"),
        row("洗衣机呢？", "一千元。"),
    )
    where, how = find_leaks(rows, held_out, 0.85)
    assert where.tolist() == [0, 0, 1, -1]
    assert how.tolist() == [b"row", b"question", b"near", b""]
    assert find_leaks(rows, held_out, None)[1].tolist() == [b"row", b"question", b"", b""]


def test_nothing_leaks_into_nothing() -> None:
    none = signatures()
    assert len(find_leaks(none, none, 0.8)[0]) == 0
    assert find_leaks(signatures(row("a")), none, 0.8)[0].tolist() == [-1]


def test_signatures_are_the_same_in_another_process() -> None:
    code = (
        "from pingjia.data.duplicates import signature\nfrom pingjia.types import Example, Message\n"
        "s = signature(Example((Message('user', '冰箱 ABC 三年'), Message('assistant', '好'))))\n"
        "print(s.exact.hex(), s.question, s.bands.tolist(), s.minhash.tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("text", ["", "。", "好", "好的"])
def test_short_texts_have_a_signature(text: str) -> None:
    made = signatures(row(text, ""), row(text, ""))
    assert find_near(made, 0.85, np.ones(2, bool)).tolist() == [-1, 0]
