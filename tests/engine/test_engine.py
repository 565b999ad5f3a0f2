"""The engine on a tiny random network: answers equal transformers' own `generate`, whatever the batch looks like."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pingjia.chat import Tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.engine.prompts import as_requests
from pingjia.errors import EngineError, ModelError, ModelNotFound, PromptTooLong, RecipeError, RequestError
from pingjia.types import Chunk, Completion, Grammar, Message, Request, Sampling

MakeEngine = Callable[..., Engine]


def some_prompts(seed: int = 0, count: int = 8, longest: int = 90) -> list[str]:
    """Some of them share a beginning."""
    rng = random.Random(seed)
    texts = ["".join(chr(rng.randrange(32, 120)) for _ in range(rng.randrange(1, longest))) for _ in range(count)]
    beginning = "".join(chr(rng.randrange(32, 120)) for _ in range(50))
    return texts + [beginning + text for text in texts[:3]]


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "few seats": {"max_num_seqs": 3},
    "pieces of 7": {"max_num_batched_tokens": 7},
    "preemption": {"page_size": 4, "kv_cache_tokens": 200},
    "preemption in pieces without cache": {
        "page_size": 4, "kv_cache_tokens": 200, "max_num_batched_tokens": 7, "prefix_caching": False,
    },
    "no prefix cache": {"prefix_caching": False},
    "pages of one token": {"page_size": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(
    reference: Callable[..., list[int]], letters: Tokenizer, make_tiny: Callable[..., LlamaForCausalLM]
) -> Any:
    model = make_tiny()
    return [reference(model, letters.render_text(p), 40, letters.stop_ids) for p in some_prompts()]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_batched_answers_equal_generate(tiny_engine: MakeEngine, expected: list[list[int]], settings: Any) -> None:
    engine = tiny_engine(**settings)
    assert len({tuple(ids[:5]) for ids in expected}) > 5, "the network answers everything alike: no test of anything"
    for _ in range(2):  # the second time with whatever the cache kept
        answers = engine.generate(some_prompts(), Sampling(max_tokens=40))
        assert [list(a.token_ids) for a in answers] == expected
    if settings.get("prefix_caching", True):
        assert engine.stats().cached_tokens_total > 0
    else:
        assert engine.stats().cached_tokens_total == 0
    if "kv_cache_tokens" in settings:
        assert engine._scheduler.num_preemptions > 0
    assert engine.stats().kv_tokens_used == 0


def test_requests_arriving_and_leaving_midway_change_no_other_answer(
    tiny_engine: MakeEngine, letters: Tokenizer, expected: list[list[int]]
) -> None:
    engine = tiny_engine(page_size=4, kv_cache_tokens=320, max_num_batched_tokens=20)
    rng, prompts = random.Random(5), [letters.render_text(p) for p in some_prompts()]
    todo, got = list(range(len(prompts))), dict[str, list[Chunk]]()
    doomed = {f"doomed{i}": i for i in range(4)}
    for name, i in doomed.items():
        engine.add(Request(name, tuple(prompts[i]), Sampling(max_tokens=40)))
    while todo or engine.has_work():
        if todo and rng.random() < 0.4:
            index = todo.pop()
            engine.add(Request(str(index), tuple(prompts[index]), Sampling(max_tokens=40)))
        if doomed and rng.random() < 0.1:
            engine.cancel(doomed.popitem()[0])
        for request_id, chunk in engine.step():
            got.setdefault(request_id, []).append(chunk)
    assert all(sum(c.finish_reason is not None for c in chunks) == 1 for chunks in got.values())
    assert {i: [t for c in got[str(i)] for t in c.token_ids] for i in range(len(prompts))} == dict(enumerate(expected))
    assert {got[f"doomed{i}"][-1].finish_reason for i in range(4)} <= {"cancelled", "length", "stop"}
    assert any(got[f"doomed{i}"][-1].finish_reason == "cancelled" for i in range(4))


def test_long_and_short_contexts_decode_together(
    tiny_engine: MakeEngine, reference: Callable[..., list[int]], letters: Tokenizer, tiny_model: LlamaForCausalLM
) -> None:
    """Decodes are grouped by length, so lengths that differ a hundredfold take several groups."""
    prompts = ["x" * n + "?" for n in (1, 2, 30, 31, 150, 430)]
    wanted = [reference(tiny_model, letters.render_text(p), 20, letters.stop_ids) for p in prompts]
    answers = tiny_engine(tiny_model, page_size=4).generate(prompts, Sampling(max_tokens=20))
    assert [list(a.token_ids) for a in answers] == wanted


# ---- what a caller may hand in and gets back


def test_one_string_and_one_conversation_count_as_one_prompt(tiny_engine: MakeEngine) -> None:
    engine, sampling = tiny_engine(), Sampling(max_tokens=5)
    (from_text,) = engine.generate("abc", sampling)
    (from_list,) = engine.generate(["abc"], sampling)
    (from_chat,) = engine.generate([Message("user", "abc")], sampling)
    (from_dicts,) = engine.generate([[{"role": "user", "content": "abc"}]], sampling)
    assert from_text.token_ids == from_list.token_ids == from_chat.token_ids == from_dicts.token_ids
    assert engine.generate([], sampling) == []


def test_samplings_go_with_their_prompts_and_on_done_comes_as_each_ends(tiny_engine: MakeEngine) -> None:
    ended: list[tuple[int, Completion]] = []
    samplings = [Sampling(max_tokens=n, ignore_eos=True) for n in (9, 3, 6)]
    answers = tiny_engine().generate(["a", "b", "c"], samplings, on_done=lambda i, c: ended.append((i, c)))
    assert [a.usage.completion_tokens for a in answers] == [9, 3, 6]
    assert [index for index, _ in ended] == [1, 2, 0]
    assert all(answers[index] is completion for index, completion in ended)
    with pytest.raises(RequestError, match="2 samplings for 1 prompts"):
        tiny_engine().generate(["a"], samplings[:2])


def test_streamed_pieces_join_to_the_whole_answer(tiny_engine: MakeEngine) -> None:
    engine, sampling = tiny_engine(), Sampling(max_tokens=30)
    (whole,) = engine.generate("abc", sampling)
    chunks = list(engine.stream("abc", sampling))
    assert "".join(c.text for c in chunks) == whole.text
    assert tuple(t for c in chunks for t in c.token_ids) == whole.token_ids
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.cached_tokens == 3  # all of an equal prompt but its last token, computed for its logits


def test_closing_a_stream_ends_its_request(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    stream = engine.stream("abc", Sampling(max_tokens=400, ignore_eos=True))
    next(stream)
    assert engine.stats().num_running == 1
    stream.close()
    assert engine.stats().num_running == 0
    assert not engine.has_work()


def test_streams_may_be_read_in_turns(tiny_engine: MakeEngine) -> None:
    engine, sampling = tiny_engine(), Sampling(max_tokens=12, ignore_eos=True)
    wanted = [engine.generate(p, sampling)[0].token_ids for p in ("abc", "xyz")]
    streams = [engine.stream(p, sampling) for p in ("abc", "xyz")]
    pairs = list(zip(*streams, strict=True))
    assert [tuple(t for pair in pairs for t in pair[i].token_ids) for i in range(2)] == wanted


def test_generate_may_be_called_from_several_threads(tiny_engine: MakeEngine) -> None:
    engine, prompts, got = tiny_engine(), some_prompts(), {}
    wanted = [a.token_ids for a in engine.generate(prompts, Sampling(max_tokens=20))]

    def ask(index: int) -> None:
        got[index] = engine.generate(prompts[index], Sampling(max_tokens=20))[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(len(prompts))] == wanted


def test_generate_beside_requests_added_by_hand_leaves_their_chunks_to_step(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    engine.add(Request("mine", (1, 70, 71), Sampling(max_tokens=3, ignore_eos=True)))
    engine.generate("abc", Sampling(max_tokens=10, ignore_eos=True))
    assert [request_id for request_id, _ in engine.step()] == ["mine"] * 3


# ---- refusals


def test_what_can_never_fit_is_refused_with_both_numbers(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(max_model_len=50)
    with pytest.raises(PromptTooLong, match=r"41 tokens and max_tokens is 10: together 51, but .* 50") as caught:
        engine.generate("x" * 40, Sampling(max_tokens=10))
    assert caught.value.code == "context_length_exceeded"
    assert engine.generate("x" * 39, Sampling(max_tokens=10, ignore_eos=True))[0].finish_reason == "length"
    assert tiny_engine(kv_cache_tokens=64).max_model_len == 64


def test_one_refused_prompt_leaves_nothing_of_its_batch_behind(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(max_model_len=50)
    with pytest.raises(PromptTooLong):
        engine.generate(["a", "b" * 60], Sampling(max_tokens=5))
    assert not engine.has_work()
    assert engine.stats().num_steps == 0


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request("r", (), Sampling()), RequestError, "empty"),
        (Request("r", (1, 128), Sampling()), RequestError, "0 to 127"),
        (Request("r", (1, -1), Sampling()), RequestError, "0 to 127"),
        (Request("r", (1,), Sampling(), adapter="nobody"), ModelNotFound, "'nobody'"),
        (Request("twice", (1,), Sampling()), RequestError, "already running"),
    ],
)
def test_bad_requests_are_refused(tiny_engine: MakeEngine, request_: Request, error: type, message: str) -> None:
    engine = tiny_engine()
    engine.add(Request("twice", (1, 65), Sampling(max_tokens=2)))
    with pytest.raises(error, match=message):
        engine.add(request_)
    assert engine.stats().num_waiting == 1


def test_settings_that_cannot_be_kept_are_refused(tiny_engine: MakeEngine) -> None:
    with pytest.raises(RecipeError, match="built for 512"):
        tiny_engine(max_model_len=513)
    with pytest.raises(RecipeError, match="pool holds 64"):
        tiny_engine(max_model_len=100, kv_cache_tokens=64)
    with pytest.raises(ModelError, match="needs its tokenizer"):
        Engine(tiny_engine()._served.base.model)
    with pytest.raises(ModelError, match="not int"):
        Engine(7)  # type: ignore[arg-type]


# ---- failures


def test_a_failing_step_ends_its_requests_once_and_the_engine_serves_on(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(max_num_seqs=2)
    for name in "abc":
        engine.add(Request(name, (1, 65, ord(name)), Sampling(max_tokens=6, ignore_eos=True)))
    run, news = engine._runner.run, []

    def fail_once(slices: Any) -> torch.Tensor:
        monkeypatch.setattr(engine._runner, "run", run)
        raise RuntimeError("out of memory: tried to allocate\nmore")

    monkeypatch.setattr(engine._runner, "run", fail_once)
    while engine.has_work():
        news += engine.step()
    reasons = {request_id: chunk.finish_reason for request_id, chunk in news if chunk.finish_reason}
    assert reasons == {"a": "error", "b": "error", "c": "length"}
    assert sum(chunk.finish_reason is not None for _, chunk in news) == 3
    assert "out of memory: tried to allocate" in next(c.error for i, c in news if i == "a")
    assert engine.stats().kv_tokens_used == 0


def test_generate_raises_at_the_end_when_an_answer_failed(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ended = tiny_engine(max_num_seqs=1), []
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda slices: run(slices) if ended else run(slices) * torch.nan)
    with pytest.raises(EngineError, match=r"1 of 2 answers failed.*not a number"):
        engine.generate(["a", "b"], Sampling(max_tokens=3, ignore_eos=True), on_done=lambda i, c: ended.append(c))
    assert [c.finish_reason for c in ended] == ["error", "length"]


def test_not_a_number_in_one_request_reaches_no_other(tiny_engine: MakeEngine) -> None:
    """A poisoned embedding: only who uses it fails."""
    engine = tiny_engine(max_num_batched_tokens=8)
    healthy = engine.generate("hello", Sampling(max_tokens=20))[0].token_ids
    with torch.no_grad():
        engine._served.base.model.model.embed_tokens.weight[5] = torch.nan
    engine.add(Request("sick", (1, 65, 66, 5, *range(60, 70)), Sampling(max_tokens=9)))
    engine.add(Request("well", tuple(engine.tokenizer.render_text("hello")), Sampling(max_tokens=20)))
    news: list[tuple[str, Chunk]] = []
    while engine.has_work():
        news += engine.step()
    assert [c.finish_reason for i, c in news if i == "sick"] == ["error"]
    assert tuple(t for i, c in news for t in c.token_ids if i == "well") == healthy


def test_pages_that_held_not_a_number_are_clean_for_whoever_comes_next(tiny_engine: MakeEngine) -> None:
    """Sequences of different lengths decode together, so the unused end of the shorter one's page is read, masked."""
    engine, prompts = tiny_engine(kv_cache_tokens=64, prefix_caching=False), ["hello", "a longer prompt"]
    healthy = [a.token_ids for a in engine.generate(prompts, Sampling(max_tokens=9))]
    with torch.no_grad():
        engine._served.base.model.model.embed_tokens.weight[5] = torch.nan
    engine.add(Request("sick", (1, *[5] * 50), Sampling(max_tokens=9)))
    assert [chunk.finish_reason for _, chunk in engine.step()] == ["error"]
    assert [a.token_ids for a in engine.generate(prompts, Sampling(max_tokens=9))] == healthy


def test_an_answer_that_cannot_be_decoded_ends_alone(tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine.add(Request("bad", (1, 65), Sampling(max_tokens=5, ignore_eos=True)))
    engine.add(Request("good", (1, 66), Sampling(max_tokens=5, ignore_eos=True)))
    monkeypatch.setattr(engine._live["bad"].answer._decoder, "feed", lambda ids: "".join([][ids[0] :][0]))
    news = []
    while engine.has_work():
        news += engine.step()
    assert [c.finish_reason for i, c in news if c.finish_reason and i == "bad"] == ["error"]
    assert [c.finish_reason for i, c in news if c.finish_reason and i == "good"] == ["length"]


# ---- facts


def test_stats_and_cards_say_what_happened(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(kv_cache_tokens=320)
    prompt = "y" * 32
    first, second = (engine.generate(prompt, Sampling(max_tokens=4, ignore_eos=True))[0] for _ in range(2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 32)
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.generation_tokens_total) == (66, 32, 8)
    assert (stats.kv_tokens_total, stats.kv_tokens_used, stats.num_steps) == (320, 0, 8)
    assert stats.compute_s_total > 0
    (card,) = engine.models()
    assert (card.id, card.parent, card.max_model_len) == ("llama", None, 320)
    assert "320 tokens" in engine.limits.describe()


def test_the_automatic_pool_is_bounded_by_need_budget_and_free_memory() -> None:
    from pingjia.engine.limits import resolve

    def tokens(gib: float, free: int, per_token: int = 1000) -> int:
        settings = EngineSettings(kv_cache_gib=gib)
        return resolve(settings, model_len=2048, bytes_per_token=per_token, free_bytes=free).kv_cache_tokens

    assert tokens(1.0, 10**12) == 16 * 2048
    assert tokens(0.01, 10**12) == int(0.01 * 2**30) // 1000 // 16 * 16
    assert tokens(1.0, 4 * 10**6) == 992
    with pytest.raises(RecipeError, match="no room for a KV cache"):
        tokens(1.0, 10**4)


# ---- several answers to one prompt


SHARING: list[dict[str, int]] = [{}, {"max_num_seqs": 2}, {"page_size": 4, "kv_cache_tokens": 160}, {"page_size": 1}]


@pytest.mark.parametrize("settings", SHARING, ids=str)
def test_n_answers_equal_n_requests_and_compute_the_prompt_once(tiny_engine: MakeEngine, settings: Any) -> None:
    prompt, drawn = "one prompt, " * 4, Sampling(max_tokens=30, temperature=1.0, seed=5)
    alone = [tiny_engine().generate(prompt, replace(drawn, seed=5 + k))[0].token_ids for k in range(4)]
    engine = tiny_engine(**settings)
    computed: list[int] = []
    requests = as_requests(prompt, replace(drawn, n=4), None, engine.tokenizer, map(str, range(4)))
    for request in requests:
        engine.add(request)
    chunks: dict[str, list[Chunk]] = {}
    while engine.has_work():
        for request_id, chunk in engine.step():
            chunks.setdefault(request_id, []).append(chunk)
        computed.append(sum(engine.step_tokens.values()))
    assert computed[0] == len(requests[0].prompt_ids)
    assert [tuple(t for c in chunks[r.id] for t in c.token_ids) for r in requests] == alone
    assert len(set(alone)) == 4
    answers = tiny_engine(**settings).generate(["abc", prompt], [Sampling(max_tokens=3), replace(drawn, n=4)])
    assert [a.token_ids for a in answers[1:]] == alone
    if not settings:
        assert [a.usage.cached_tokens for a in answers] == [0, 0, *[answers[1].usage.prompt_tokens] * 3]
        assert sum(computed) == len(requests[0].prompt_ids) + sum(len(ids) - 1 for ids in alone)


def test_n_answers_with_a_grammar_each_have_their_own_place_in_it(tiny_engine: MakeEngine) -> None:
    held = Sampling(max_tokens=60, temperature=1.5, seed=1, n=8, grammar=Grammar.regex("([a-f][0-9]){3,9}"))
    answers = tiny_engine(page_size=4).generate("say", held)
    assert len({a.text for a in answers}) > 4
    assert all(re.fullmatch("([a-f][0-9]){3,9}", a.text) for a in answers)


def test_a_stream_of_n_answers_says_which_is_which(tiny_engine: MakeEngine) -> None:
    drawn = Sampling(max_tokens=9, temperature=1.0, seed=5, n=3, ignore_eos=True)
    engine = tiny_engine()
    chunks = list(engine.stream("abc", drawn))
    assert sorted(c.index for c in chunks if c.finish_reason) == [0, 1, 2]
    texts = ["".join(c.text for c in chunks if c.index == k) for k in range(3)]
    assert texts == [a.text for a in engine.generate("abc", drawn)]
    assert len(list(engine.stream("abc", replace(drawn, n=1)))) == 9


def test_strangers_with_an_equal_prompt_share_its_computation(
    tiny_engine: MakeEngine, reference: Callable[..., list[int]], letters: Tokenizer, tiny_model: LlamaForCausalLM
) -> None:
    ids = tuple(letters.render_text("x y z " * 10))
    engine = tiny_engine(tiny_model, max_num_batched_tokens=20)
    wanted = reference(tiny_model, ids, 12, letters.stop_ids)
    engine.add(Request("a", ids, Sampling(max_tokens=12)))
    engine.step()
    engine.add(Request("b", ids, Sampling(max_tokens=5)))
    engine.add(Request("c", ids, Sampling(max_tokens=12)))
    engine.cancel("a")  # the one that computes leaves: another goes on
    got: dict[str, list[int]] = {}
    while engine.has_work():
        for request_id, chunk in engine.step():
            got.setdefault(request_id, []).extend(chunk.token_ids)
    assert got["c"] == wanted
    assert got["b"] == wanted[:5]
    assert engine.stats().kv_tokens_used == 0


def test_one_request_is_one_answer(tiny_engine: MakeEngine) -> None:
    with pytest.raises(RequestError, match="one answer"):
        tiny_engine().add(Request("a", (1, 2), Sampling(n=2)))
    with pytest.raises(RequestError, match="n must be between 1 and 16"):
        Sampling(n=17)


def test_a_not_a_number_in_a_shared_prompt_ends_all_of_them_and_no_other(
    tiny_engine: MakeEngine, letters: Tokenizer
) -> None:
    engine = tiny_engine()
    network = engine._runner.run

    def broken(plan: list[Any]) -> torch.Tensor:
        logits = network(plan).clone()
        for row, piece in enumerate(plan):
            if piece.sequence.tokens[1] == ord("!"):
                logits[row] = float("nan")
        return logits

    engine._runner.run = broken  # type: ignore[method-assign]
    for name, text in (("bad1", "! no"), ("good", "yes"), ("bad2", "! no")):
        engine.add(Request(name, tuple(letters.render_text(text)), Sampling(max_tokens=4, ignore_eos=True)))
    ends: dict[str, list[str]] = {}
    while engine.has_work():
        for request_id, chunk in engine.step():
            ends.setdefault(request_id, []).extend([chunk.finish_reason] if chunk.finish_reason else [])
    assert ends == {"bad1": ["error"], "bad2": ["error"], "good": ["length"]}
    assert engine.stats().kv_tokens_used == 0
