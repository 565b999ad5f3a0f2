"""Guesses from the prompt: answers stay what they are, in fewer steps where they repeat what stood before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from pingjia.chat import Tokenizer
from pingjia.engine import Engine
from pingjia.engine.draft import Drafter, agreed
from pingjia.types import Grammar, Request, Sampling

MakeEngine = Callable[..., Engine]
NONE: frozenset[int] = frozenset()


# ---- what is guessed


def test_what_followed_the_last_three_tokens_is_guessed_and_goes_on_in_circles() -> None:
    assert Drafter().propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 3) == [4, 5, 6]
    assert Drafter().propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 0) == []
    assert Drafter().propose([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1) == [8], "the latest place counts"
    assert Drafter().propose([7, 1, 2, 1, 2, 1], 5) == [2, 1, 2, 1]
    assert Drafter().propose([1, 2, 3, 4, 5], 5) == []
    assert Drafter().propose([], 5) == Drafter().propose([1, 2], 5) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_reading_piece_by_piece_finds_what_reading_at_once_finds(tokens: list[int], most: int) -> None:
    grown = Drafter()
    for size in range(len(tokens)):
        grown.propose(tokens[:size], 0)
    assert grown.propose(tokens, most) == Drafter().propose(tokens, most)


def test_wrong_guesses_are_given_up_and_tried_again_later() -> None:
    drafter, text = Drafter(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1, 2, 3]
    sizes = []
    for _ in range(40):
        guesses = drafter.propose(text, 12)
        sizes.append(len(guesses))
        if guesses:
            drafter.learn(len(guesses), 0)
    assert sizes[:3] == [4, 2, 0]
    assert 3 <= sum(size > 0 for size in sizes) <= 5
    for _ in range(30):
        if guesses := drafter.propose(text, 12):
            drafter.learn(len(guesses), len(guesses))
    assert len(drafter.propose(text, 12)) == 12


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_only_the_networks_own_choices_are_said(guesses: list[int], choices: list[int]) -> None:
    chosen = choices[: len(guesses) + 1]
    said = agreed(guesses, chosen, NONE)
    assert said == chosen[: len(said)]
    assert said[:-1] == guesses[: len(said) - 1]
    assert len(said) == len(chosen) or said[-1] != guesses[len(said) - 1]
    ended = agreed(guesses, chosen, frozenset({0}))
    assert ended == said[: said.index(0) + 1 if 0 in said else None]


# ---- in the engine


def tokens_and_steps(engine: Engine, prompts: list[str], sampling: Sampling) -> tuple[list[tuple[int, ...]], int]:
    before = engine.stats().num_steps
    answers = engine.generate(prompts, sampling)
    return [a.token_ids for a in answers], engine.stats().num_steps - before


@pytest.mark.parametrize("settings", [{}, {"page_size": 1}, {"page_size": 4, "kv_cache_tokens": 320}], ids=str)
def test_answers_are_the_same_in_fewer_steps(
    tiny_engine: MakeEngine, reference: Callable[..., list[int]], letters: Tokenizer, tiny_model: LlamaForCausalLM,
    settings: Any,
) -> None:  # fmt: skip
    """What a random network says to the first prompt soon repeats itself, which is easily guessed."""
    prompts, sampling = ["a", "hello", "x y z " * 4], Sampling(max_tokens=120)
    wanted = [tuple(reference(tiny_model, letters.render_text(p), 120, letters.stop_ids)) for p in prompts]
    engine = tiny_engine(tiny_model, **settings)
    tokens, _ = tokens_and_steps(engine, prompts, sampling)
    assert tokens == wanted
    assert engine.num_right_guesses > 20
    assert engine.stats().kv_tokens_used == 0
    off = tiny_engine(**settings, prompt_lookup="off")
    tokens, _ = tokens_and_steps(off, prompts, sampling)
    assert tokens == wanted
    assert off.num_guesses == 0
    (_, num_steps), (_, num_plain_steps) = (tokens_and_steps(e, ["a"], sampling) for e in (engine, off))
    assert num_steps < 0.9 * num_plain_steps


def test_wrong_guesses_change_nothing(tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_tokens=60)
    wanted, _ = tokens_and_steps(tiny_engine(prompt_lookup="off"), ["a", "hello"], sampling)
    monkeypatch.setattr(Drafter, "propose", lambda self, tokens, most: [tokens[-1] ^ 1, 3][:most])
    engine = tiny_engine(page_size=4)
    tokens, _ = tokens_and_steps(engine, ["a", "hello"], sampling)
    assert tokens == wanted
    assert engine.num_guesses - engine.num_right_guesses > 50
    tokens, _ = tokens_and_steps(engine, ["a", "hello"], sampling)  # what was kept of the pages is right
    assert tokens == wanted


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, temperature=1.0, seed=1),
        Sampling(max_tokens=40, logprobs=1),
        Sampling(max_tokens=40, repetition_penalty=1.2),
        Sampling(max_tokens=40, logit_bias={70: 3}),
        Sampling(max_tokens=40, min_tokens=4),
        Sampling(max_tokens=40, grammar=Grammar.regex("[a-c]{30}")),
    ],
    ids=["drawn", "logprobs", "penalty", "bias", "min_tokens", "grammar"],
)
def test_whoever_does_not_take_the_likeliest_token_guesses_nothing(tiny_engine: MakeEngine, sampling: Sampling) -> None:
    engine = tiny_engine()
    engine.generate("ab ab ab ab ab", sampling)
    assert engine.num_guesses == 0


def test_guesses_end_where_the_answer_ends(tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stop token, a stop string or its length, in the middle of right guesses: nothing after it is told."""
    plain = tiny_engine(prompt_lookup="off")
    (whole,) = plain.generate("hello", Sampling(max_tokens=60, ignore_eos=True))
    said = list(whole.token_ids)
    prompt = len(plain.tokenizer.render_text("hello"))
    monkeypatch.setattr(Drafter, "propose", lambda self, tokens, most: said[len(tokens) - prompt :][: min(most, 9)])
    for fields in ({"max_tokens": 13}, {"stop_token_ids": (said[20],)}, {"stop": (whole.text[30:33],)}):
        sampling = Sampling(**{"max_tokens": 60, "ignore_eos": True} | fields)
        engine = tiny_engine()
        (answer,), (wanted,) = engine.generate("hello", sampling), plain.generate("hello", sampling)
        assert engine.num_right_guesses > 0
        assert (answer.token_ids, answer.text, answer.finish_reason) == (
            wanted.token_ids, wanted.text, wanted.finish_reason,
        )  # fmt: skip
        assert answer.usage.completion_tokens == wanted.usage.completion_tokens
        assert not engine.has_work()


def test_a_step_that_fails_leaves_no_guesses_behind(tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    monkeypatch.setattr(Drafter, "propose", lambda self, tokens, most: [5, 6][:most])
    run = engine._runner.run
    engine.add(Request("r", (1, 70), Sampling(max_tokens=30, ignore_eos=True)))
    engine.step()
    sequence = engine._live["r"].sequence

    def fail(plan: list[Any]) -> torch.Tensor:
        assert plan[0].num_drafts == 2
        raise ValueError("no")

    engine._runner.run = fail  # type: ignore[method-assign]
    ((_, last),) = engine.step()
    assert last.finish_reason == "error"
    assert sequence.tokens[2:] == [sequence.tokens[2]]
    engine._runner.run = run  # type: ignore[method-assign]
    assert engine.generate("hello", Sampling(max_tokens=5, ignore_eos=True))[0].finish_reason == "length"
