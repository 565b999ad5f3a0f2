"""Domains by rules and by meaning."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

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
    ],
)
def test_bad_rules_are_named(rules: Callable[[str], DomainRules], text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rules(text)


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
