"""Signatures and what is found with them, against comparing every pair."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data import columns as column_files
from pingjia.data import duplicates
from pingjia.data.duplicates import (
    SHINGLE,
    Signatures,
    _must_agree,
    _plain,
    find_exact,
    find_near,
    signature,
    similarity,
)
from pingjia.data.leaks import NEARLY, SAME_QUESTION, SAME_ROW, find_leaks
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
    ("门店每天早上开门，营业到晚上十一点，欢迎光临。", "十一点", "十点"),
    ("这台机器的总价是一万一千元，含税并包安装。", "一万一千", "一千"),
    ("今年的维修费用比去年涨了一点五倍，请您谅解。", "一点五倍", "五倍"),
    ("师傅上门安装空调大约需要一个半小时，请留人在家。", "一个半小时", "半小时"),
    ("仓库里现在还有二十一个同款的充电器可以发货。", "二十一个", "二十个"),
    ("這款冰箱的保修期是兩年，憑發票到門店辦理。", "兩年", "五年"),
    ("這款冰箱有電子發票，請到門店的櫃台辦理。", "有電子", "沒有電子"),
    ("洗衣机整机的保修期是3年，凭发票到店办理。", "3年", "3个月"),
    ("押金会在三个月后退回您原来的账户，请耐心等待。", "三个月", "三个星期"),
    ("冷冻室应当调到-5度，冷藏室按说明书设置。", "-5度", "5度"),
    ("您买的这台榨汁机的型号是KL-200，配件在盒子里。", "KL-200", "KM-200"),
    ("售后服务的电话每天上午9点开始有人接听。", "上午", "下午"),
    ("Our stores close at 9 pm every day of the week.", "9 pm", "9 am"),
    ("A refund takes two weeks after we receive your parcel.", "two weeks", "four weeks"),
    ("A refund takes 3 weeks after we receive your parcel.", "3 weeks", "3 days"),
    ("The technician comes to your street every Monday morning.", "Monday", "Friday"),
    ("Returning the parcel by post costs you $5 in total.", "$5", "€5"),
    ("We are able to repair this kettle in our workshop.", "able", "unable"),
    ("The shop round the corner is closed on Mondays.", "Mondays", "Fridays"),
    ("The summer sale of our stores begins in May.", "May", "March"),
    ("Either of the two plugs fits into this kettle.", "Either", "Neither"),
]


@pytest.mark.parametrize(("text", "old", "new"), TWO_FACTS)
def test_rows_that_differ_by_a_number_or_a_no_are_never_near(text: str, old: str, new: str) -> None:
    assert old in text
    assert near(row(text * 3), row(text.replace(old, new, 1) + text * 2), threshold=0.3) == [-1, -1]


LONG = (
    "请判断下面这段对话里客户的情绪，只回答正面、负面或中性。客户说收到的冰箱外观很漂亮，师傅也热情，只是运送久了些。"
)


@pytest.mark.parametrize(
    ("left", "right"), [("正面", "负面"), ("发动机异响", "刹车片磨损"), ("neutral", "positive"), ("是", "")]
)
@pytest.mark.parametrize("repeats", [1, 5])
def test_a_short_answer_to_a_long_question_must_be_the_same(left: str, right: str, repeats: int) -> None:
    question = LONG * repeats
    assert near(row(question, left), row(question + "请看", right)) == [-1, -1]
    assert near(row(question, left), row(question + "请看", left)) == [-1, 0]


@given(st.integers(10, 200), st.integers(1, 200), st.integers(0, 99))
def test_a_wholly_different_answer_is_never_near(num_asked: int, num_told: int, seed: int) -> None:
    """Whatever the lengths, down to the lowest threshold that a recipe may have."""
    chance = random.Random(seed)
    question, one = sentence(chance, num_asked), sentence(chance, num_told)
    other = "".join(chr(0x6E00 + ord(c) % 97) for c in one)  # no character in common
    assert near(row(question, one), row(question, other), threshold=0.7) == [-1, -1]


SAME_FACT = [("请问一下有一些优惠吗", "请问有优惠吗"), ("统一寄给您，万一坏了一样能换", "寄给您，坏了能换")]
SAME_FACT += [("保修 3 年", "保修3年"), ("ｍａｘ　５ｋｇ", "max 5 kg"), ("You may keep it", "You can keep it")]


@pytest.mark.parametrize(("left", "right"), SAME_FACT)
def test_what_is_no_number_does_not_keep_rows_apart(left: str, right: str) -> None:
    assert _must_agree(_plain(left)) == _must_agree(_plain(right))


def test_small_changes_of_wording_are_near() -> None:
    text = "我们的门店每天都开门，欢迎您带着发票来办理退货手续，工作人员会帮您检查商品，然后把款项退回原来的账户。"
    assert near(row(text), row(text.replace("欢迎您", "欢迎")), row(text + "谢谢")) == [-1, 0, 0]


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
    assert float(np.std(errors)) < 0.045  # of 128 independent values it is 0.044 at most


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


SMALL = st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), max_size=24)


def columns(rows: list[list[int]]) -> Signatures:
    """Signatures of 4 values in 2 bands of 2, from few different values, so that much collides."""
    minhash = np.array(rows, np.uint8).reshape(-1, 4)
    bands = np.stack([minhash[:, 0] * 3 + minhash[:, 1], minhash[:, 2] * 3 + minhash[:, 3]]).astype(np.uint64)
    zero = np.zeros(len(rows), np.uint64)
    return Signatures(np.stack([zero, zero], axis=1), zero, bands, minhash)


def meet(made: Signatures, i: int, j: int, threshold: float) -> bool:
    shared = any(band[i] == band[j] for band in made.bands)
    return shared and bool(similarity(made.minhash[i], made.minhash[j]) >= threshold)


def greedy(made: Signatures, threshold: float, alive: list[bool]) -> list[bool]:
    """Row by row, every pair: which rows go."""
    gone: list[bool] = []
    for i in range(len(made)):
        gone.append(alive[i] and any(alive[j] and not gone[j] and meet(made, i, j, threshold) for j in range(i)))
    return gone


@given(SMALL, st.sampled_from([0.0, 0.45, 0.7, 1.0]), st.data())
def test_near_equals_the_greedy_walk_over_all_pairs(
    rows: list[list[int]], threshold: float, data: st.DataObject
) -> None:
    made = columns(rows)
    alive = [data.draw(st.booleans()) for _ in rows]
    found = find_near(made, threshold, np.array(alive, bool))
    assert (found >= 0).tolist() == greedy(made, threshold, alive)
    for i, j in enumerate(found.tolist()):
        if j >= 0:
            assert j < i
            assert alive[j]
            assert found[j] == -1
            assert meet(made, i, j, threshold)


@given(SMALL, st.sampled_from([0.0, 0.45, 0.7, 1.0]), st.integers(0, 24))
def test_near_leaks_equal_all_pairs(rows: list[list[int]], threshold: float, cut: int) -> None:
    mine, theirs = columns(rows[cut:]), columns(rows[:cut])
    everything = columns(rows)
    near_ones = find_leaks(_unlike(mine), theirs, threshold)[0] >= 0
    cut = min(cut, len(rows))
    expected = [any(meet(everything, i, j, threshold) for j in range(cut)) for i in range(cut, len(rows))]
    assert near_ones.tolist() == expected


def _unlike(made: Signatures) -> Signatures:
    """The same bands and values, of other conversations."""
    return Signatures(made.exact + np.uint64(1), made.question + np.uint64(1), made.bands, made.minhash)


def test_the_size_of_a_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(4)
    texts = [sentence(chance, 60) for _ in range(15)]
    rows = [row(chance.choice(texts) + sentence(chance, 3)) for _ in range(150)]
    made = signatures(*rows)
    found = find_near(made, 0.7, np.ones(150, bool))
    leaks = find_leaks(_unlike(made), signatures(*rows[:40]), 0.7)
    assert (found >= 0).sum() > 50
    monkeypatch.setattr(duplicates, "_BATCH", 7)
    monkeypatch.setattr(column_files, "CHUNK", 13)
    monkeypatch.setattr(column_files, "PIECE", 40)
    assert find_near(made, 0.7, np.ones(150, bool)).tolist() == found.tolist()
    assert find_leaks(_unlike(made), signatures(*rows[:40]), 0.7)[0].tolist() == leaks[0].tolist()


def test_a_bucket_crowded_with_copies_hides_no_copy() -> None:
    """A strange row first in its bucket, then 60 copies: the last is still compared with the first copy."""
    minhash = np.zeros((61, 4), np.uint8)
    minhash[0] = [0, 0, 9, 9]
    minhash[1:, 3] = 5
    one = np.zeros((1, 61), np.uint64)
    zero = np.zeros(61, np.uint64)
    made = Signatures(np.stack([zero, zero], axis=1), zero, one, minhash)
    assert find_near(made, 0.9, np.ones(61, bool)).tolist() == [-1, -1] + [1] * 59


def test_many_copies_of_many_rows_take_little_memory() -> None:
    """20,000 rows that are variants of one: each is near thousands, and no list of those pairs is ever made."""
    chance = np.random.default_rng(1)
    size, bands = 20_000, 16
    minhash = np.where(chance.random((size, 128)) < 0.06, chance.integers(0, 256, (size, 128)), 7).astype(np.uint8)
    minhash[0] = 7
    keys = np.stack([minhash[:, i].astype(np.uint64) for i in range(bands)])
    zero = np.zeros(size, np.uint64)
    made = Signatures(np.stack([zero, zero], axis=1), zero, keys, minhash)
    tracemalloc.start()
    found = find_near(made, 0.85, np.ones(size, bool))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found >= 0).mean() > 0.95
    assert peak < 60e6  # 20,000 rows x 33 neighbours x 16 bands x 16 bytes would be 169 MB


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
    assert how.tolist() == [SAME_ROW, SAME_QUESTION, NEARLY, 0]
    assert find_leaks(rows, held_out, None)[1].tolist() == [SAME_ROW, SAME_QUESTION, 0, 0]


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


def test_signatures_are_these_everywhere() -> None:
    """Known values: a new version of the hash would make stored signatures worthless without a word."""
    made = signature(row("冰箱 ABC 保修3年吗？", "是的"))
    digest = hashlib.sha256(made.bands.astype("<u8").tobytes() + made.minhash.tobytes()).hexdigest()
    assert made.exact.hex() == "795bd3d37f5d2c4d184f991f01233a59"
    assert made.question == 10130557829613737864
    assert digest == "b20b8c8fc8c04239e5dbae3d367aa01f939529897afcc479219d9398d529336b"


def test_without_near_the_rest_of_a_signature_is_the_same() -> None:
    whole, plain = signature(row("冰箱多少钱？")), signature(row("冰箱多少钱？"), near=False)
    assert (plain.exact, plain.question) == (whole.exact, whole.question)
    assert plain.bands.shape == whole.bands.shape
    assert not plain.bands.any()
    assert plain.minhash.dtype == whole.minhash.dtype


def test_signatures_travel() -> None:
    made = signature(row("冰箱"))
    again = pickle.loads(pickle.dumps(made))
    assert (again.exact, again.question) == (made.exact, made.question)
    assert again.bands.tolist() == made.bands.tolist()
    assert again.minhash.tolist() == made.minhash.tolist()


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_has_a_signature(question: str, answer: str) -> None:
    made = signatures(row(question, answer), row(question, answer))
    assert find_exact(made).tolist() == [-1, 0]
    assert find_near(made, 1.0, np.ones(2, bool)).tolist() == [-1, 0]


@pytest.mark.parametrize("text", ["\ud800", "ﷺ" * 50, "a" * 200_000, "3" * 100_000, "a-" * 50_000, "🙂🙃"])
def test_odd_texts_have_a_signature(text: str) -> None:
    assert len(signature(row(text)).exact) == 16


def test_signs_alone_are_told_apart() -> None:
    assert near(row("🙂", "🎉"), row("🙃", "🎈"), row("🙂", "🎉")) == [-1, -1, 0]


@pytest.mark.parametrize("text", ["", "。", "好", "好的"])
def test_short_texts_have_a_signature(text: str) -> None:
    made = signatures(row(text, ""), row(text, ""))
    assert find_near(made, 0.85, np.ones(2, bool)).tolist() == [-1, 0]
