"""Choosing tokens: filters against transformers' own, penalties against a plain reference, seeds, distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pingjia.chat import Tokenizer
from pingjia.engine import Engine
from pingjia.engine.grammar import DeadEnd
from pingjia.engine.sample import Pick, Sampler, candidates, pick
from pingjia.errors import RequestError
from pingjia.types import Request, Sampling

MakeEngine = Callable[..., Engine]


# ---- which tokens are left


def transformers_probs(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits_V[None].clone())[0].softmax(-1)


@settings(deadline=None, max_examples=150)
@given(
    temperature=st.floats(0.2, 2.0),
    top_k=st.sampled_from([0, 1, 7, 400, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    spread=st.sampled_from([0.05, 1.0, 5.0]),  # nearly flat rows need more than the likely few tokens
    seed=st.integers(0, 10_000),
)
def test_filters_leave_what_transformers_leaves(
    temperature: float, top_k: int, top_p: float, min_p: float, spread: float, seed: int
) -> None:
    logits_V = torch.randn(600, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs, ids = candidates(logits_V / temperature, sampling)
    got_V = torch.zeros(600)
    got_V[ids if ids is not None else slice(None)] = probs / probs.sum()
    wanted_V = transformers_probs(logits_V, sampling)
    # The border of a nucleus is a comparison of rounded sums: one token may fall on either side of it.
    differs = ((got_V > 0) != (wanted_V > 0)).nonzero().flatten()
    assert len(differs) <= 1
    if len(differs) == 0:
        torch.testing.assert_close(got_V, wanted_V, atol=1e-6, rtol=1e-4)
    else:
        assert float(torch.maximum(got_V, wanted_V)[differs]) < 0.01


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_p=0.8)],
    ids=["plain", "top_k", "top_p"],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square of 20,000 draws stays below its 99.9 % quantile."""
    logits_V = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    sampler, num_draws = Sampler(sampling, [], seed=1), 20_000
    counts = Counter(sampler.choose(logits_V) for _ in range(num_draws))
    probs = transformers_probs(logits_V, sampling)
    assert set(counts) == set(probs.nonzero().flatten().tolist())
    chi_square = sum((counts[i] - num_draws * float(probs[i])) ** 2 / (num_draws * float(probs[i])) for i in counts)
    quantile = {3: 16.27, 4: 18.47, 5: 20.52, 7: 24.32}[len(counts) - 1]
    assert chi_square < quantile


# ---- penalties


def penalised_by_hand(logits: list[float], prompt: list[int], answer: list[int], s: Sampling) -> list[float]:
    """The published formulas, one token at a time."""
    out = list(logits)
    for i in range(len(out)):
        if i in prompt or i in answer:
            out[i] = out[i] / s.repetition_penalty if out[i] > 0 else out[i] * s.repetition_penalty
        out[i] -= s.frequency_penalty * answer.count(i) + s.presence_penalty * (i in answer)
    return out


@settings(deadline=None, max_examples=100)
@given(
    prompt=st.lists(st.integers(0, 19), max_size=10),
    answer=st.lists(st.integers(0, 19), max_size=15),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    frequency=st.sampled_from([0.0, -2.0, 0.7]),
    presence=st.sampled_from([0.0, -0.4, 2.0]),
    seed=st.integers(0, 1000),
)
def test_penalties_equal_the_formulas(
    prompt: list[int], answer: list[int], repetition: float, frequency: float, presence: float, seed: int
) -> None:
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    sampler = Sampler(sampling, prompt, seed=0)
    before = logits_V.clone()
    for token in answer:
        sampler.choose(logits_V)
        sampler.record(token)
    wanted = penalised_by_hand(logits_V.tolist(), prompt, answer, sampling)
    assert sampler.choose(logits_V) == max(range(20), key=wanted.__getitem__)
    if (repetition, frequency, presence) != (1.0, 0.0, 0.0):
        torch.testing.assert_close(sampler._penalise(logits_V), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_V, before)


def test_repetition_penalty_equals_generate(
    tiny_engine: MakeEngine, tiny_model: LlamaForCausalLM, letters: Tokenizer
) -> None:
    prompt = letters.render_text("hello world")
    wanted = tiny_model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=1.4, pad_token_id=0
    )[0, len(prompt) :].tolist()
    (plain,) = tiny_engine(tiny_model).generate("hello world", Sampling(max_tokens=30))
    (answer,) = tiny_engine().generate("hello world", Sampling(max_tokens=30, repetition_penalty=1.4))
    assert list(answer.token_ids) == wanted
    assert answer.token_ids != plain.token_ids


# ---- seeds


WILD = Sampling(max_tokens=30, temperature=1.0, seed=7, ignore_eos=True)


def test_a_seeded_answer_does_not_depend_on_its_company(tiny_engine: MakeEngine) -> None:
    (alone,) = tiny_engine().generate("hello", WILD)
    others = [Sampling(max_tokens=n, temperature=1.5, top_p=0.9) for n in (5, 20, 40)]
    crowded = tiny_engine(max_num_batched_tokens=9).generate(["aaaa", "bbbb" * 9, "c", "hello"], [*others, WILD])[3]
    engine = tiny_engine(page_size=4, kv_cache_tokens=72, prefix_caching=False)
    engine.add(Request("old", (1, *range(60, 80)), Sampling(max_tokens=40, ignore_eos=True)))
    (preempted,) = engine.generate("hello", WILD)
    assert engine._scheduler.num_preemptions > 0
    assert alone.token_ids == crowded.token_ids == preempted.token_ids
    assert len(set(alone.token_ids)) > 10


def test_other_seeds_and_no_seed_give_other_answers(tiny_engine: MakeEngine) -> None:
    engine, unseeded = tiny_engine(), Sampling(max_tokens=30, temperature=1.0, ignore_eos=True)
    seeded = [Sampling(max_tokens=30, temperature=1.0, ignore_eos=True, seed=s) for s in (1, 2, 2)]
    answers = engine.generate(["hello"] * 5, [*seeded, unseeded, unseeded])
    assert answers[1].token_ids == answers[2].token_ids
    assert len({a.token_ids for a in answers}) == 4


def test_the_engines_seed_makes_unseeded_requests_repeatable(tiny_engine: MakeEngine) -> None:
    unseeded = Sampling(max_tokens=20, temperature=1.0)
    first, second, other = (tiny_engine(seed=s).generate(["a", "b"], unseeded) for s in (3, 3, 4))
    assert [a.token_ids for a in first] == [a.token_ids for a in second] != [a.token_ids for a in other]


# ---- what is reported


def test_logprobs_are_the_models_own(tiny_engine: MakeEngine, tiny_model: LlamaForCausalLM, letters: Tokenizer) -> None:
    sampling = Sampling(max_tokens=8, temperature=0.5, top_k=3, seed=1, logprobs=4, ignore_eos=True)
    prompt = letters.render_text("hello")
    (answer,) = tiny_engine().generate("hello", sampling)
    with torch.no_grad():
        logits_TV = tiny_model(torch.tensor([prompt + list(answer.token_ids)])).logits[0]
    assert len(answer.logprobs) == 8
    for i, entry in enumerate(answer.logprobs):
        logprobs_V = logits_TV[len(prompt) - 1 + i].log_softmax(-1)
        assert entry.token_id == answer.token_ids[i]
        assert entry.logprob == pytest.approx(float(logprobs_V[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == logprobs_V.topk(4).indices.tolist()
        assert sum(math.exp(p) for _, p in entry.top) <= 1.0


def test_logprobs_zero_reports_the_token_alone_and_none_nothing() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    (entry,) = pick(logits, [Sampler(Sampling(logprobs=0), [], 0)])
    assert entry.logprob is not None
    assert (entry.token_id, entry.logprob.token_id, entry.logprob.top) == (1, 1, ())
    (entry,) = pick(logits, [Sampler(Sampling(), [], 0)])
    assert entry.logprob is None


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (entry,) = pick(torch.tensor([[0.0, 3.0, 1.0]]), [Sampler(Sampling(logprobs=20, top_k=50), [], 0)])
    assert entry.logprob is not None
    assert [token for token, _ in entry.logprob.top] == [1, 2, 0]


# ---- what a caller adds, and ends that come too early


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 19), st.floats(-100, 100, width=32), max_size=6), st.integers(0, 999))
def test_a_bias_is_added_to_the_logits_before_everything_else(bias: dict[int, float], seed: int) -> None:
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    before_V = logits_V.clone()
    wanted_V = logits_V.clone()
    for token, value in bias.items():
        wanted_V[token] += value
    assert Sampler(Sampling(logit_bias=bias), [], 0).choose(logits_V) == int(wanted_V.argmax())
    drawn = Sampling(temperature=0.8, top_k=5, repetition_penalty=1.3, presence_penalty=0.5)
    plain, biased = Sampler(drawn, [3, 4], seed), Sampler(replace(drawn, logit_bias=bias), [3, 4], seed)
    for _ in range(5):
        token = plain.choose(wanted_V)
        assert biased.choose(logits_V) == token
        plain.record(token)
        biased.record(token)
    assert torch.equal(logits_V, before_V), "the row belongs to the caller"


def test_a_bias_forces_and_forbids_in_the_engine_and_leaves_logprobs_alone(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    plain = Sampling(max_tokens=8, ignore_eos=True, logprobs=1)
    (free,) = engine.generate("hello", plain)
    (forced,) = engine.generate("hello", replace(plain, logit_bias={ord("a"): 100}))
    assert forced.text == "a" * 8
    assert forced.logprobs[0].top[0] == pytest.approx(free.logprobs[0].top[0])
    (forbidden,) = engine.generate("hello", replace(plain, logit_bias={free.token_ids[0]: -100}))
    assert free.token_ids[0] not in forbidden.token_ids
    with pytest.raises(RequestError, match=r"token 128 is outside 0\.\.127"):
        engine.generate("hello", Sampling(logit_bias={128: 1}))
    assert not engine.has_work()


@pytest.mark.parametrize("bias", [{5: 101}, {5: -100.5}, {5: math.nan}, {-1: 1}, {"5": 1}, {True: 1}, {1.0: 1}])
def test_a_bias_that_is_none_is_refused(bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias") as caught:
        Sampling(logit_bias=bias)
    assert caught.value.param == "logit_bias"


def test_a_sampling_with_a_bias_can_be_compared_and_is_not_changed_from_outside() -> None:
    bias = {7: 1.0, 5: -2}
    sampling = Sampling(logit_bias=bias)
    bias[9] = 3.0
    assert dict(sampling.logit_bias) == {5: -2, 7: 1.0}
    assert sampling == Sampling(logit_bias=((5, -2), (7, 1.0)))
    assert hash(sampling) == hash(replace(sampling))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_is_sampled_before_min_tokens(tiny_engine: MakeEngine, temperature: float) -> None:
    engine = tiny_engine()
    eager = {2: 30, ord("z"): 29}  # both ends, by far the likeliest
    ends = Sampling(max_tokens=20, temperature=temperature, seed=1, logit_bias=eager, stop_token_ids=(ord("z"),))
    (early,) = engine.generate("hello", ends)
    assert len(early.token_ids) == 1
    (late,) = engine.generate("hello", replace(ends, min_tokens=6))
    assert len(late.token_ids) == 7
    assert not {2, ord("z")} & set(late.token_ids[:6])
    (cut,) = engine.generate("hello", replace(ends, min_tokens=20))
    assert (len(cut.token_ids), cut.finish_reason) == (20, "length")
    with pytest.raises(RequestError, match="min_tokens 21 is more than max_tokens 20"):
        replace(ends, min_tokens=21)


def test_one_row_without_a_way_on_leaves_the_others_their_tokens() -> None:
    class Stuck:
        def allowed_V(self) -> torch.Tensor:
            raise DeadEnd("no way")

    matchers: list[Any] = [None, Stuck(), None]
    samplers = [Sampler(Sampling(), [], 0, matcher=matcher) for matcher in matchers]
    first, second, third = pick(torch.tensor([[0.0, 3.0, 1.0]] * 3), samplers)
    assert isinstance(second, DeadEnd)
    assert isinstance(first, Pick)
    assert isinstance(third, Pick)
    assert (first.token_id, third.token_id) == (1, 1)
