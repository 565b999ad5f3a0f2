"""Made rows: the right number, only the question changed, lineage kept, and nothing protected was ever damaged."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.augment import AugmentCounts, Filters, Quota, Refusal, Task, augment, normal, question
from pingjia.data.back_translation import BackTranslation
from pingjia.data.read import read_examples
from pingjia.data.settings import AugmentSettings
from pingjia.data.spans import protected_spans
from pingjia.data.synonyms import Synonyms
from pingjia.data.write import row_of
from pingjia.errors import PingjiaError
from pingjia.types import Example, Message


class Counting:
    """Words each question by a number; keeps the size of each batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def make(self, tasks: Sequence[Task]) -> list[str | Refusal]:
        self.batches.append(len(tasks))
        return [f"{task.text}（{task.copy}）版{task.key}" for task in tasks]


class Always:
    def __init__(self, outcome: str | Refusal) -> None:
        self.outcome = outcome

    def make(self, tasks: Sequence[Task]) -> list[str | Refusal]:
        return [self.outcome for _ in tasks]


def _example(n: int = 1, text: str = "怎么退货", **extras: Any) -> Example:
    return Example((Message("user", f"{text}{n}"), Message("assistant", "七天内可以")), where=f"a.jsonl:{n}", **extras)


def _settings(synonyms: float = 0.0, back: float = 0.0, **others: Any) -> AugmentSettings:
    return AugmentSettings.model_validate(
        {"synonyms": {"ratio": synonyms}, "back_translation": {"ratio": back}, **others}
    )


def _run(
    examples: Sequence[Example], maker: Any, ratio: float = 1.0, seed: int = 1, filters: Filters | None = None
) -> tuple[list[Example], AugmentCounts]:
    counts = AugmentCounts()
    made = augment(examples, _settings(ratio), {"synonyms": maker}, seed, filters=filters or Filters(), counts=counts)
    return list(made), counts


# ---- how many, and which


@given(st.integers(0, 200), st.decimals(0, 10, places=2), st.integers(0, 1000))
def test_n_rows_get_n_times_the_ratio(num_rows: int, ratio: Any, seed: int) -> None:
    quota = Quota(float(ratio), seed, "synonyms")
    copies = [quota.next() for _ in range(num_rows)]
    assert abs(sum(copies) - num_rows * Fraction(ratio)) < 1
    assert all(abs(n - Fraction(ratio)) < 1 for n in copies)


def test_half_is_every_second_row_and_the_seed_says_which() -> None:
    examples = [_example(i) for i in range(20)]
    chosen = {seed: [e.augmented_from for e in _run(examples, Counting(), 0.5, seed)[0]] for seed in range(12)}
    even, odd = ([f"a.jsonl:{i}" for i in range(start, 20, 2)] for start in (0, 1))
    assert all(rows in (even, odd) for rows in chosen.values())
    assert even in chosen.values()
    assert odd in chosen.values()


def test_two_of_each() -> None:
    made, counts = _run([_example(1), _example(2)], Counting(), 2.0)
    assert [e.where for e in made] == [f"a.jsonl:{i}~synonyms{copy}" for i in (1, 2) for copy in (1, 2)]
    assert counts.made == {"synonyms": 4}


def test_a_ratio_of_0_asks_nobody() -> None:
    counts = AugmentCounts()
    assert list(augment([_example()], _settings(), {}, 1, counts=counts)) == []
    assert not counts.asked


def test_only_rows_of_the_domains() -> None:
    examples = [_example(1, domain="store"), _example(2, domain="school"), _example(3)]
    made = augment(examples, _settings(1, domains=["store"]), {"synonyms": Counting()}, 1)
    assert [e.augmented_from for e in made] == ["a.jsonl:1"]


def test_the_same_seed_the_same_rows() -> None:
    examples = [_example(i, "请问您好，目前商品多久发货，怎么退货，订单") for i in range(50)]
    runs = [_run(examples, Synonyms(0.3), 0.7, seed)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_memory_does_not_grow_with_the_rows() -> None:
    """Rows are taken as they are needed, in batches."""
    maker, taken = Counting(), 0

    def rows() -> Any:
        nonlocal taken
        for taken in range(1000):
            yield _example(taken)

    made = augment(rows(), _settings(1), {"synonyms": maker}, 1)
    next(made)
    assert taken < 100
    assert maker.batches == [64]


# ---- what a made row is


def test_only_the_last_question_changes() -> None:
    messages = (
        Message("system", "你是客服"),
        Message("user", "几点开门"),
        Message("assistant", "九点"),
        Message("user", "那周末呢，多久"),
        Message("assistant", "查"),
        Message("tool", "{}"),
        Message("assistant", "十点开门"),
    )
    original = Example(
        messages, "b.jsonl:7", "store", "zh", "t", "shop", "十点", ("十点",), ("a.png",), ('{"name":"f"}',), 2.0
    )
    (made,), _ = _run([original], Always("那周末呢，多长时间"))
    assert made.messages == (*messages[:3], Message("user", "那周末呢，多长时间"), *messages[4:])
    lineage = {"where": "b.jsonl:7~synonyms1", "source": "synonyms", "augmented_from": "b.jsonl:7"}
    assert made == replace(original, messages=made.messages, **lineage)
    assert question(made) == "那周末呢，多长时间"


def test_a_made_row_can_be_written() -> None:
    (made,), _ = _run([_example(domain="store", facts=("七天",))], Always("如何退货"))
    assert row_of(made) == {
        "prompt": "如何退货",
        "response": "七天内可以",
        "domain": "store",
        "source": "synonyms",
        "augmented_from": "a.jsonl:1",
        "facts": ["七天"],
    }


# ---- what is refused


def _refused(outcome: Any, filters: Filters | None = None, examples: Sequence[Example] = ()) -> dict[str, int]:
    made, counts = _run(examples or [_example()], Always(outcome), 1.0, 1, filters)
    assert counts.asked["synonyms"] == len(made) + sum(counts.refused.get("synonyms", {}).values())
    assert set(counts.reasons) == set(counts.refused.get("synonyms", {}))
    return dict(counts.refused.get("synonyms", {}))


def test_refusals_are_counted_by_rule() -> None:
    assert _refused(Refusal("no_synonym", "none")) == {"no_synonym": 1}
    assert _refused("怎么 退货1？") == {"unchanged": 1}
    assert _refused("新的说法", examples=[_example(1), _example(2)]) == {"duplicate": 1}


def test_a_wording_that_another_row_has_is_refused() -> None:
    examples = [_example(1), _example(2, "如何退货")]
    made, counts = _run(examples[::-1], Always("如何退货2"))
    assert made == []
    assert counts.refused["synonyms"] == {"unchanged": 1, "duplicate": 1}


def test_a_held_out_question_is_never_made() -> None:
    filters = Filters(is_held_out=lambda text: normal(text) == "新的说法")
    assert _refused("新的说法？", filters) == {"held_out": 1}


def test_a_wording_too_unlike_is_refused() -> None:
    asked: list[Sequence[tuple[str, str]]] = []

    def similarity(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked.append(pairs)
        return [0.79 if "差" in new else 0.8 for new, _ in pairs]

    filters = Filters(similarity=similarity, min_similarity=0.8)
    assert _refused("很差的说法", filters) == {"quality": 1}
    assert _refused("很好的说法", filters) == {}
    assert asked[0] == [("很差的说法", "怎么退货1")]
    _, counts = _run([_example()], Always("很差的说法"), filters=filters)
    assert counts.reasons["quality"] == "similarity 0.790 to the original, below 0.8"


def test_without_a_threshold_nothing_is_scored() -> None:
    filters = Filters(similarity=lambda pairs: pytest.fail("asked"), min_similarity=None)
    assert _refused("很好的说法", filters) == {}


@pytest.mark.parametrize(
    "text", ["“快”的近义词是什么", "把这句话翻译成英文", "Give a synonym of fast", "用高兴造句", "Rewrite it"]
)
def test_questions_about_words_are_left_alone(text: str) -> None:
    assert _refused("别的说法", examples=[_example(1, text)]) == {"about_words": 1}


def test_a_document_is_left_alone() -> None:
    assert _refused("别的说法", examples=[_example(1, "怎么退货" * 1001)]) == {"too_long": 1}


def test_two_makers_on_one_row() -> None:
    counts = AugmentCounts()
    makers = {"synonyms": Always("如何退货"), "back_translation": Always("怎样才能退货")}
    made = list(augment([_example()], _settings(1, 1), makers, 1, counts=counts))
    assert [(e.where, question(e)) for e in made] == [
        ("a.jsonl:1~synonyms1", "如何退货"),
        ("a.jsonl:1~back_translation1", "怎样才能退货"),
    ]
    assert counts.made == {"synonyms": 1, "back_translation": 1}


# ---- a thousand of them


class Careless:
    """Rewords well most of the time; else loses, doubles, swaps or spoils what it was given, or fails."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def translate(self, texts: Sequence[str]) -> list[str | PingjiaError]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> str | PingjiaError:
        text = text.replace("怎么", "如何").replace("多久", "多长时间").replace("吗", "么").replace("？", "呢？")
        text = text.replace("请", "麻烦").replace("写", "写出").replace("what", "which")
        kind = self._rng.randrange(12)
        damages = {
            0: lambda: re.sub(r"XQ\d+", "", text),
            1: lambda: re.sub(r"(XQ\d+)", r"\1 \1", text),
            2: lambda: text.replace("XQ0", "XQ@").replace("XQ1", "XQ0").replace("XQ@", "XQ1"),
            3: lambda: text.replace("不", "").replace("没", "").replace("n't", ""),
            4: lambda: text + "第3个",
            5: lambda: PingjiaError("the server gave up"),
            6: lambda: re.sub(r"\d", "7", text),
        }
        return damages[kind]() if kind in damages else text


def _templates() -> list[Example]:
    """1,000 questions full of what must not change."""
    rng = random.Random(5)
    names, goods = ["张伟", "李娜", "北京", "《三体》", "“慢半拍”"], ["KX-200", "A12B", "iPhone 15", "QH-7 Pro"]
    numbers = ["3天", "1,024元", "三年半", "百分之五", "下午三点", "2024-05-01", "¥99", "20%", "第二", "两个半小时"]
    slots = [
        "{name}",
        "{{order}}",
        "<slot>",
        "%s",
        "[姓名]",
        "【手机号】",
        "$VAR",
        "`pip install`",
        "😀",
        "a.b@example.com",
    ]
    forms = [
        "请问{name}买的{good}用了{number}就坏了，怎么退货，不收费吧？",
        "您好，{good}的运费是{number}吗？{slot}没有收到，多久能到？",
        "{name}的{good}没法开机，{slot}，怎么维修？",
        "为什么{number}还没发货？{name}说别担心，可是{slot}一直不变。",
        "我想咨询一下，{good}现在卖{number}，能退吗？网址https://example.com/{i}打不开。",
        "Can you tell {name} why the {good} doesn't turn on after {number}? See {slot}.",
    ]
    examples = []
    for i in range(1000):
        fill = {"name": rng.choice(names), "good": rng.choice(goods), "number": rng.choice(numbers), "i": i}
        text = rng.choice(forms).format(slot=rng.choice(slots), **fill) + f" 单号{100000 + i}"
        examples.append(Example((Message("user", text), Message("assistant", "好")), f"t.jsonl:{i}", facts=("运费",)))
    return examples


def test_a_thousand_made_rows_with_every_protected_span_intact() -> None:
    """Counted independently of `breach`: each protected string stands as often, and in the same order, as before."""
    names = [f"samples:{n}.jsonl" for n in ("customer_service", "tutoring", "writing")]
    examples = [*_templates(), *read_examples(names, on_problem=lambda p: pytest.fail(str(p)))]
    makers = {"synonyms": Synonyms(0.5), "back_translation": BackTranslation(Careless(1), Careless(2))}
    counts = AugmentCounts()
    made = list(augment(examples, _settings(1, 1), makers, 3, counts=counts))
    assert counts.made["synonyms"] + counts.made["back_translation"] == len(made) >= 1000
    assert min(counts.made.values()) >= 300
    assert sum(counts.refused["back_translation"].values()) >= 300
    assert set(counts.refused["back_translation"]) >= {"placeholders", "spans", "translation_failed"}

    originals = {e.where: e for e in examples}
    num_spans = 0
    for row in made:
        assert row.augmented_from is not None
        before, after = question(originals[row.augmented_from]), question(row)
        pieces = [before[s.start : s.end] for s in protected_spans(before, row.facts)]
        num_spans += len(pieces)
        at = 0
        for piece in pieces:  # in order
            at = after.find(piece, at)
            assert at >= 0, (before, after, piece)
            at += len(piece)
        assert all(before.count(piece) == after.count(piece) for piece in pieces), (before, after)
        assert "XQ" not in after
        assert row.messages[1:] == originals[row.augmented_from].messages[1:] or len(row.messages) > 2
    assert num_spans > 4000
    assert len({normal(question(r)) for r in (*made, *examples)}) >= len(made) + 1000
