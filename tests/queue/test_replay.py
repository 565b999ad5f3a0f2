"""However two workers cut the same answer, a reader gets it once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import EngineError
from pingjia.queue.job import Part
from pingjia.queue.replay import Replay
from pingjia.types import Chunk, TokenLogprob

WORDS = [" one", " two", "三", "四", "", " five"]


def answer(ids, cuts, index=0):
    """The same answer in chunks that end at `cuts`; an empty text stands for half a character."""
    ends = [*sorted({c % (len(ids) + 1) for c in cuts} - {0}), len(ids)]
    chunks, start = [], 0
    for end in ends:
        piece = tuple(ids[start:end])
        text = "".join(WORDS[i] for i in piece)
        chunks.append(Chunk(text, piece, tuple(TokenLogprob(i, -0.5) for i in piece), index=index))
        start = end
    return [*chunks, Chunk("", finish_reason="stop", index=index)]


def join(chunks):
    ids = tuple(i for c in chunks for i in c.token_ids)
    logprobs = tuple(t.token_id for c in chunks for t in c.logprobs)
    return "".join(c.text for c in chunks), ids, logprobs, [c.finish_reason for c in chunks if c.finish_reason]


CUTS = st.lists(st.integers(0, 30), max_size=8)


@given(st.lists(st.integers(0, 5), max_size=20), CUTS, CUTS, CUTS, st.integers(0, 12), st.integers(0, 12))
def test_an_answer_begun_three_times_is_read_once(ids, first, second, third, stop_first, stop_second):
    replay, got = Replay(), []
    plans = [(1, answer(ids, first)[:stop_first]), (2, answer(ids, second)[:stop_second]), (3, answer(ids, third))]
    for delivery, chunks in plans:
        for seq, chunk in enumerate(chunks, start=1):
            got += replay.take(Part(delivery, seq, (chunk,)))
    text, all_ids, logprobs, ends = join(got)
    assert (text, all_ids, ends) == ("".join(WORDS[i] for i in ids), tuple(ids), ["stop"])
    assert logprobs == tuple(ids)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=10), st.lists(st.integers(0, 5), max_size=10), st.integers(1, 9)
)
def test_another_answer_is_an_error_and_not_a_mixture(ids, others, stop):
    replay, got = Replay(), []
    passed = answer(ids, range(30))[:stop]
    for seq, chunk in enumerate(passed, start=1):
        got += replay.take(Part(1, seq, (chunk,)))
    sent = tuple(i for c in got for i in c.token_ids)
    again = answer(others, [])
    if tuple(others)[: len(sent)] == sent:
        return
    with pytest.raises(EngineError, match="did not come to the same answer"):
        replay.take(Part(2, 1, tuple(again)))


def test_choices_do_not_mix():
    replay = Replay()
    got = replay.take(Part(1, 1, (Chunk("a", (1,), index=0), Chunk("b", (2,), index=1))))
    got += replay.take(Part(2, 1, (Chunk("b", (2,), index=1), Chunk("a", (1,), index=0))))
    got += replay.take(Part(2, 2, (Chunk("c", (3,), index=1), Chunk("d", (4,), index=0))))
    assert [(c.index, c.text) for c in got] == [(0, "a"), (1, "b"), (1, "c"), (0, "d")]


def test_what_an_abandoned_worker_left_behind_is_skipped():
    replay = Replay()
    replay.take(Part(2, 1, (Chunk("a", (1,)),)))
    assert replay.take(Part(1, 7, (Chunk("x", (9,)),))) == []
