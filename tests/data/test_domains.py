"""Domains by rules and by meaning."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pingjia.data import domains
from pingjia.data.domains import DomainRules, cluster, load_rules
from pingjia.errors import RecipeError
from pingjia.types import Example, Message


def row(question: str, answer: str = "好") -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


@pytest.fixture
def rules(tmp_path: Path) -> Callable[[str], DomainRules]:
    def load(text: str) -> DomainRules:
        file = tmp_path / "domains.yaml"
        file.write_text(text, encoding="utf-8")
        return load_rules(file)

    return load


RULES = """
returns: [退货, 退款, refund]
shop: [/营业|开门/, order, 门店]
"""


@pytest.mark.parametrize(
    ("question", "domain"),
    [
        ("怎么退货？", "returns"),
        ("门店几点开门？", "shop"),
        ("退款到门店，门店开门吗", "shop"),  # three hits against one
        ("门店退货", "returns"),  # one each: the first in the file
        ("I want a REFUND", "returns"),
        ("a border crossing", None),
        ("my order", "shop"),
        ("你好", None),
    ],
)
def test_by_rules(rules: Callable[[str], DomainRules], question: str, domain: str | None) -> None:
    loaded = pickle.loads(pickle.dumps(rules(RULES)))
    assert loaded.domain_of(row(question)) == domain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "is a mapping of keys to values, not a list"),
        ("a: []", "a: must be a word or a list of words"),
        ("a: {b: c}", "a: must be a word or a list of words"),
        ("a: [true]", "a: True is no word"),
        ("a: [/(/]", "is no regular expression"),
        ("a: [/(x)/]", r"write groups as \(\?:\.\.\.\)"),
        ("a: ['/(?:x+)+y/']", "repeats a repetition"),
        ("a: x\na: y", "given twice"),
        ("true: [x]", r"domain True is no text; write it in quotes"),
        ("a: [1.50]", r"1\.5 is no word; write it in quotes"),
        ("a: [2024-05-01]", "is no word; write it in quotes"),
        ("a: [x, '/(?i)refund/']", "is no regular expression here: global flags"),
        ("a: ['/x*/']", "fits the empty text"),
        ("a: ['/(?:(?:a+)b?)+c/']", "repeats a repetition"),
        ("a: ['/(?:a|aa)+c/']", "repeats a choice"),
        ("a: ['/(?:x{2,})*y/']", "repeats a repetition"),
        ("a: ['/" + "x" * 501 + "/']", "501 characters"),
        ("'': [x]", "domain '' is no text"),
    ],
)
def test_bad_rules_are_named(rules: Callable[[str], DomainRules], text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rules(text)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:退|换)货",
        r"(?:ab)+",
        r"[(*+]+x",
        r"\(a+\)+",
        r"\d{3,4}-\d+",
        "a{2}b",
        "(?:a|b){3}",
        "(?:a|b).*c",
        "(?:a+)?b",
        "a+?b",
    ],
)
def test_harmless_patterns_are_taken(rules: Callable[[str], DomainRules], pattern: str) -> None:
    assert rules(f"a: ['/{pattern}/']").patterns


def test_only_question_and_answer_decide(rules: Callable[[str], DomainRules]) -> None:
    """A system prompt names all that a shop does, in every row."""
    example = Example((Message("system", "你负责退货、退款和门店。"), *row("今天下雨吗").messages))
    assert rules(RULES).domain_of(example) is None


def test_places_are_no_hits(rules: Callable[[str], DomainRules]) -> None:
    assert rules(r"a: ['/\b/']" + "\nb: [门店]").domain_of(row("门店 in town")) == "b"


def test_a_long_text_is_read_in_part(rules: Callable[[str], DomainRules]) -> None:
    assert rules(RULES).domain_of(row("门" * 5000 + "退货")) is None


def test_numbers_are_words(rules: Callable[[str], DomainRules]) -> None:
    assert rules("hotline: [12315]").domain_of(row("打12315投诉")) == "hotline"


def test_the_order_of_the_rows_does_not_decide_the_groups() -> None:
    """Twelve topics one after the other, as files joined from several sources are."""
    chance = np.random.default_rng(0)
    centres = chance.normal(0, 1, (12, 64))
    sizes = [100, 900, 150, 800, 400, 700, 200, 300, 500, 150, 250, 300]
    texts = [f"{topic} {i}" for topic, size in enumerate(sizes) for i in range(size)]

    def embed(batch: Sequence[str]) -> np.ndarray:
        topics, seeds = zip(*((int(n) for n in text.split()) for text in batch), strict=True)
        noise = [np.random.default_rng([t, s]).normal(0, 0.6, 64) for t, s in zip(topics, seeds, strict=True)]
        return (centres[list(topics)] + np.array(noise)).astype(np.float32)

    found = cluster(lambda: iter(texts), len(texts), embed, 12, seed=1)
    topic_N = np.repeat(np.arange(12), sizes)
    largest = sum(int(np.bincount(topic_N[found.label == k]).max()) for k in np.unique(found.label))
    assert largest / len(texts) > 0.95  # 0.6 when the first batch chose the centres


def test_memory_holds_a_sample_of_vectors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "_SAMPLE", 300)
    asked: list[int] = []

    def counted(batch: Sequence[str]) -> np.ndarray:
        asked.append(len(batch))
        return embed(batch)

    texts = [f"{topic}问题{i}" for i in range(2000) for topic in ("退款", "天气", "数学")]
    found = cluster(lambda: iter(texts), len(texts), counted, 3, seed=1)
    assert sum(asked) == 6000 + 300
    assert max(asked) <= 1024
    assert np.bincount(found.label).tolist() == [2000] * 3


def test_no_texts_have_no_groups() -> None:
    found = cluster(lambda: iter([]), 0, embed, 3, seed=1)
    assert (found.label.tolist(), found.names) == ([], ())


def test_texts_that_are_all_the_same() -> None:
    found = cluster(lambda: iter(["退款"] * 10), 10, lambda texts: np.ones((len(texts), 3), np.float32), 3, seed=1)
    assert len(set(found.label.tolist())) == 1
    assert len(set(found.names)) == 3


def embed(texts: Sequence[str]) -> np.ndarray:
    """A stand-in for an encoder: which of three topics a text is about, with a little noise."""
    topics = ("退款", "天气", "数学")
    noise = np.random.default_rng(len(texts)).normal(0, 0.05, (len(texts), 3))
    return (np.array([[float(t in text) for t in topics] for text in texts]) + noise).astype(np.float32)


def test_by_meaning() -> None:
    texts = [f"{topic}问题{i}怎么办" for i in range(700) for topic in ("退款", "天气", "数学")]
    found = cluster(lambda: iter(texts), len(texts), embed, 3, seed=1)
    groups = [set(found.label[i::3].tolist()) for i in range(3)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 3
    names = [found.names[next(iter(group))] for group in groups]
    assert [topic in name for topic, name in zip(("退款", "天气", "数学"), names, strict=True)] == [True] * 3
    again = cluster(lambda: iter(texts), len(texts), embed, 3, seed=1)
    assert again.label.tolist() == found.label.tolist()
    assert again.names == found.names


def test_no_more_groups_than_texts() -> None:
    found = cluster(lambda: iter(["退款", "天气"]), 2, embed, 5, seed=1)
    assert len(found.names) == 2
