"""Which questions are equal: only those that must have one answer, for one owner, from the same weights."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.gateway.cache_key import Weights, cache_key, is_repeatable, weights_of
from pingjia.gateway.cached_answer import CachedAnswer, compact, load
from pingjia.types import Chunk, Grammar, ModelCard, Request, Sampling, TokenLogprob, Usage

OTHER = {
    "max_tokens": 17, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 5, "stop": ("x",), "stop_token_ids": (3,),
    "ignore_eos": True, "logprobs": 2, "n": 2, "min_tokens": 3, "include_stop_str_in_output": True,
    "logit_bias": ((5, 1.0),), "grammar": Grammar("regex", "a+"),
}  # fmt: skip
W = Weights("base", "adapter")


def key(sampling=None, ids=(1, 2), weights=W, owner="a", **fields):
    return cache_key(Request("r", ids, sampling or Sampling(), **fields), weights, owner)


def test_every_sampling_field_is_tried_here():
    assert set(OTHER) == {f.name for f in dataclasses.fields(Sampling)}


@pytest.mark.parametrize("name", OTHER)
def test_any_other_sampling_is_another_question(name):
    assert key(Sampling(**{name: OTHER[name]})) != key()


def test_what_names_a_request_is_no_part_of_the_question():
    ask = Request("one", (1, 2), Sampling(), "x")
    assert cache_key(ask, W, "a") == cache_key(dataclasses.replace(ask, id="two", adapter="y"), W, "a")


def test_a_new_field_of_requests_counts_until_somebody_says_otherwise():
    @dataclasses.dataclass(frozen=True)
    class Newer(Request):
        image: str = ""

    one, two = (Newer("r", (1,), Sampling(), None, image) for image in ("cat", "dog"))
    assert cache_key(one, W, "a") != cache_key(two, W, "a")


texts = st.text(max_size=12)
questions = st.tuples(
    st.lists(st.integers(0, 2**31), max_size=6).map(tuple),
    st.builds(Weights, texts, texts),
    texts,
    st.dictionaries(st.sampled_from(sorted(OTHER)), st.just(0), max_size=4),
)


@settings(max_examples=300)
@given(questions, questions)
def test_two_questions_have_one_key_only_if_they_are_one(one, two):
    """Other tenant, other adapter, other tokens, other sampling: never the same key, wherever the lines are drawn."""
    keys = [
        key(Sampling(**{n: OTHER[n] for n in names} | _sound(names)), ids, weights, owner)
        for ids, weights, owner, names in (one, two)
    ]
    assert (keys[0] == keys[1]) == (one == two)


def _sound(names):
    """min_tokens and grammar cannot be asked for together."""
    return {"min_tokens": 0, "ignore_eos": False} if "grammar" in names else {}


CARDS = [ModelCard("base", "/b", digest="B"), ModelCard("shop", "/s", "base", digest="S")]


def test_weights():
    assert weights_of(CARDS[0], CARDS) == Weights("B", "")
    assert weights_of(CARDS[1], CARDS) == Weights("B", "S")
    assert len({key(weights=weights_of(card, CARDS)) for card in CARDS}) == 2


@pytest.mark.parametrize("blank", [0, 1])
def test_without_a_digest_nothing_is_kept(blank):
    cards = [dataclasses.replace(c, digest="") if i == blank else c for i, c in enumerate(CARDS)]
    assert weights_of(cards[1], cards) is None
    assert weights_of(CARDS[1], CARDS[1:]) is None


def test_repeatable():
    assert is_repeatable(Sampling())
    assert is_repeatable(Sampling(temperature=1.0, seed=0))
    assert not is_repeatable(Sampling(temperature=0.01))


# ---- the form in which an answer is kept

logprobs = st.builds(
    TokenLogprob,
    st.integers(0, 9),
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(st.integers(0, 9), st.floats(max_value=0, allow_nan=False)), max_size=2).map(tuple),
)
pieces = st.builds(
    Chunk,
    text=st.text(max_size=5).filter(lambda t: t.isprintable()),
    token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    index=st.integers(0, 2),
)
END = Chunk("!", (1,), finish_reason="stop", usage=Usage(7, 9, 2))


@given(st.lists(pieces, max_size=30))
def test_what_is_kept_says_the_same(chunks):
    answer = CachedAnswer((*chunks, END), 12.5, 0.25)
    again = load(answer.dump())
    assert (again.made_at, again.seconds) == (12.5, 0.25)
    assert len(again.chunks) <= len(answer.chunks)
    for index in range(3):
        for field in ("text", "token_ids", "logprobs"):
            parts = [
                [item for c in a.chunks if c.index == index for item in getattr(c, field)] for a in (answer, again)
            ]
            assert parts[0] == parts[1]
    assert again.chunks[-1] == END
    assert load(again.dump()) == CachedAnswer(tuple(compact(again.chunks)), 12.5, 0.25)


def test_long_answers_come_in_pieces_still():
    chunks = [Chunk("a", (i,)) for i in range(100)]
    assert 5 < len(compact([*chunks, END])) < 20


def test_a_replayed_prompt_is_all_cached():
    assert CachedAnswer((END,), 0, 0).replay()[-1].usage == Usage(7, 9, 7)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1,2]", b"[1,2,[]]", b'[1,2,[["a",[1],[],null,null,0]]]', b"[1,2,[[]]]", b"\xff", b"null"]
)
def test_what_is_no_answer_is_refused(data):
    with pytest.raises(ValueError, match=r".*"):
        load(data)


def test_no_secret_of_the_owner_is_in_a_key():
    assert json.dumps(key(owner="tenant 平价")).isascii()
    assert len(key()) == 64
