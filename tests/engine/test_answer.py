"""Where an answer ends and what of it is text: stop strings, stop tokens, lengths, pieces that join."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.chat import Tokenizer, load_tokenizer
from pingjia.engine import Engine
from pingjia.engine.answer import Answer, StopStrings
from pingjia.engine.sample import Pick
from pingjia.types import Chunk, Request, Sampling


def cut_by_hand(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Read one character at a time; end when some stop string is complete, and cut the longest such off."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            return text[: end - len(max(hits, key=len))], True
    return text, False


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, said = StopStrings(tuple(stops)), ""
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    stopped = False
    for start, end in pairwise(edges):
        piece, stopped = finder.push(text[start:end])
        said += piece
        assert text.startswith(said), "what has been said is never taken back"
        if stopped:
            break
    if not stopped:
        assert not any(finder._held.endswith(s) for s in stops)
        said += finder.flush()
    assert (said, stopped) == cut_by_hand(text, stops)


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_still_become_a_stop_string(text: str, stop: str) -> None:
    finder = StopStrings((stop,))
    said, stopped = finder.push(text)
    if not stopped:
        held = text[len(said) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[i:]) for i in range(len(said)))


# ---- an answer, token by token


def say(letters: Tokenizer, text: str, **sampling: object) -> list[Chunk]:
    """The chunks of an answer whose tokens are the letters of `text`; "$" is the end token."""
    answer = Answer(Sampling(**sampling), letters.stop_ids, letters.stream(), num_prompt=3)  # type: ignore[arg-type]
    chunks = []
    for letter in text:
        chunks.append(answer.push(Pick(2 if letter == "$" else ord(letter)), num_cached=1))
        if chunks[-1].finish_reason:
            break
    return chunks


def text_of(chunks: list[Chunk]) -> str:
    return "".join(c.text for c in chunks)


@pytest.mark.parametrize(
    ("tokens", "sampling", "text", "reason", "num_tokens"),
    [
        ("hello$", {}, "hello", "stop", 6),
        ("hello$more", {"ignore_eos": True}, "hellomore", None, 10),
        ("hello", {"max_tokens": 3}, "hel", "length", 3),
        ("hel$o", {"max_tokens": 4}, "hel", "stop", 4),
        ("hello!", {"stop_token_ids": (ord("o"),)}, "hell", "stop", 5),
        ("hello$", {"stop_token_ids": (ord("o"),), "ignore_eos": True}, "hell", "stop", 5),
        ("one\n\ntwo", {"stop": ("\n\n",)}, "one", "stop", 5),
        ("one\n\n", {"stop": ("\n\n",), "max_tokens": 5}, "one", "stop", 5),
        ("one\n", {"stop": ("\n\n",), "max_tokens": 4}, "one\n", "length", 4),
        ("one\n$", {"stop": ("\n\n",)}, "one\n", "stop", 5),
    ],
)
def test_an_answer_ends(
    letters: Tokenizer, tokens: str, sampling: dict, text: str, reason: str | None, num_tokens: int
) -> None:
    chunks = say(letters, tokens, **sampling)
    assert (text_of(chunks), chunks[-1].finish_reason) == (text, reason)
    assert sum(len(c.token_ids) for c in chunks) == num_tokens
    if reason:
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, num_tokens)
        assert chunks[-1].usage.cached_tokens == 1


def test_a_stop_string_is_kept_when_it_was_asked_for(letters: Tokenizer) -> None:
    for text, said in (("ab<end>cd", "ab<end>"), ("ab<end$", "ab<end")):
        assert text_of(say(letters, text, stop=("<end>",), include_stop_str_in_output=True)) == said
    chunks = say(letters, "abc|de|f", stop=("|",), include_stop_str_in_output=True, min_tokens=5)
    assert text_of(chunks) == "abc|de|"


@pytest.mark.parametrize(("min_tokens", "said"), [(0, "ab"), (3, "ab|c"), (4, "ab|c"), (5, "ab|c|d"), (6, "ab|c|d")])
def test_stop_strings_count_in_what_comes_after_min_tokens(letters: Tokenizer, min_tokens: int, said: str) -> None:
    chunks = say(letters, "ab|c|d|e", stop=("|",), min_tokens=min_tokens)
    assert text_of(chunks) == said
    assert chunks[-1].finish_reason == "stop"


def test_a_token_that_completes_a_grammar_ends_the_answer(letters: Tokenizer) -> None:
    answer = Answer(Sampling(stop=("bc",)), letters.stop_ids, letters.stream(), num_prompt=1)
    chunks = [answer.push(Pick(ord("a")), 0), answer.push(Pick(ord("b"), ends=True), 0)]
    assert (text_of(chunks), chunks[-1].finish_reason) == ("ab", "stop")


def test_an_answer_cut_short_says_what_was_held_back(letters: Tokenizer) -> None:
    answer = Answer(Sampling(stop=("xyz",)), letters.stop_ids, letters.stream(), num_prompt=1)
    said = [answer.push(Pick(ord(c)), 0).text for c in "abxy"]
    last = answer.end("cancelled", 0)
    assert (said, last.text, last.finish_reason) == (["a", "b", "", ""], "xy", "cancelled")


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_real_text_join_to_the_whole_and_never_break_a_character(seed: int) -> None:
    tokenizer, rng = load_tokenizer("smollm2"), random.Random(seed)
    text = "".join(rng.choice("你好，世界！abc 🌟é\n") for _ in range(60))
    ids = tokenizer.encode(text)
    answer = Answer(Sampling(stop=("不会出现",)), tokenizer.stop_ids, tokenizer.stream(), num_prompt=1)
    chunks = [answer.push(Pick(i), 0) for i in ids]
    chunks.append(answer.push(Pick(min(tokenizer.stop_ids)), 0))
    assert text_of(chunks) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in c.text for c in chunks)


@pytest.mark.parametrize("size", range(1, 7))
def test_an_answer_that_is_cut_never_shows_half_a_character(size: int) -> None:
    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer.encode("🌟你禾🌟")
    answer = Answer(Sampling(max_tokens=size), tokenizer.stop_ids, tokenizer.stream(), num_prompt=1)
    chunks = [answer.push(Pick(i), 0) for i in ids[:size]]
    assert chunks[-1].finish_reason == "length"
    assert "🌟你禾🌟".startswith(text_of(chunks))


# ---- the whole engine


def test_stop_strings_end_answers_in_the_engine(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    (whole,) = engine.generate("hello", Sampling(max_tokens=40, ignore_eos=True))
    stop = whole.text[7:10]
    (cut,) = engine.generate("hello", Sampling(max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    assert not engine.has_work()


def test_a_cancelled_request_ends_in_the_next_step(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    engine.add(Request("r", (1, 70), Sampling(max_tokens=90, ignore_eos=True)))
    text = "".join(c.text for _ in range(5) for _, c in engine.step())
    engine.cancel("r")
    engine.cancel("r")
    engine.cancel("never seen")
    ((request_id, last),) = engine.step()
    assert (request_id, last.finish_reason, last.token_ids) == ("r", "cancelled", ())
    assert last.usage is not None
    assert last.usage.completion_tokens == 5 == len(text)
    assert not engine.has_work()
    assert engine.step() == []
