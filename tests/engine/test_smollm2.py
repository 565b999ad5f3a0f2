"""The real small model: what the engine says in a batch is what transformers says one by one, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from pingjia.chat import Tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.types import Chunk, Message, Request, Sampling

QUESTIONS = (
    "What is the capital of France?",
    "你好，请介绍一下你自己。",
    "Write a haiku about rain.",
    "退货需要几天？",
    "Explain in two sentences why the sky is blue, and then name three colours that are often seen at sunset.",
    "请把下面这句话翻译成英文：今天天气很好，我们去公园散步吧。",
    "2+2=",
    "我昨天买的鞋子尺码不对，想换大一号的，请问怎么办？",
)
CHATS = [[Message("user", question)] for question in QUESTIONS]
SAMPLING = Sampling(max_tokens=16)
Model = tuple[PreTrainedModel, Tokenizer]


@pytest.fixture(scope="module")
def expected(smollm2: Model, reference: Callable[..., list[int]]) -> list[list[int]]:
    model, tokenizer = smollm2
    return [reference(model, tokenizer.render(chat), SAMPLING.max_tokens, tokenizer.stop_ids) for chat in CHATS]


def engine_on(smollm2: Model, **settings: Any) -> Engine:
    model, tokenizer = smollm2
    return Engine(model, tokenizer=tokenizer, settings=EngineSettings(**settings))


def test_a_mixed_batch_equals_generate_with_and_without_reused_prefixes(
    smollm2: Model, expected: list[list[int]]
) -> None:
    engine = engine_on(smollm2)
    fresh = engine.generate(CHATS, SAMPLING)
    again = engine.generate(CHATS, SAMPLING)
    assert [list(a.token_ids) for a in fresh] == expected
    assert [list(a.token_ids) for a in again] == expected
    assert all(a.usage.cached_tokens >= 32 for a in again)
    assert [a.text for a in fresh] == [smollm2[1].decode(ids).rstrip("\ufffd") for ids in expected]


def test_answers_that_are_preempted_and_cut_in_pieces_equal_generate(smollm2: Model, expected: list[list[int]]) -> None:
    engine = engine_on(smollm2, page_size=4, kv_cache_tokens=124, max_num_batched_tokens=7, prefix_caching=False)
    assert [list(a.token_ids) for a in engine.generate(CHATS[3:], SAMPLING)] == expected[3:]
    assert engine._scheduler.num_preemptions > 0
    assert engine.stats().cached_tokens_total == 0


def test_arrivals_and_cancels_midway_leave_the_other_answers_equal(smollm2: Model, expected: list[list[int]]) -> None:
    engine, rng = engine_on(smollm2, max_num_seqs=4), random.Random(2)
    prompts = [tuple(engine.tokenizer.render(chat)) for chat in CHATS]
    engine.add(Request("doomed", prompts[4], SAMPLING))
    todo, got = list(range(len(CHATS))), dict[str, list[Chunk]]()
    while todo or engine.has_work():
        for _ in range(min(rng.randrange(3), len(todo))):
            index = todo.pop()
            engine.add(Request(str(index), prompts[index], SAMPLING))
        for request_id, chunk in engine.step():
            got.setdefault(request_id, []).append(chunk)
        if engine.stats().num_steps == 3:
            engine.cancel("doomed")
    assert [[t for c in got[str(i)] for t in c.token_ids] for i in range(len(CHATS))] == expected
    assert got["doomed"][-1].finish_reason == "cancelled"


def test_the_packaged_name_is_enough(
    monkeypatch: pytest.MonkeyPatch, smollm2: Model, expected: list[list[int]]
) -> None:
    """Loading it a second time would only cost seconds; what is tested is the way from a name to an answer."""
    monkeypatch.setattr("pingjia.engine.engine.load_model", lambda path, **_: smollm2[0])
    engine = Engine("smollm2")
    assert [card.id for card in engine.models()] == ["smollm2"]
    assert "".join(c.text for c in engine.stream(CHATS[0], SAMPLING)) == smollm2[1].decode(expected[0]).rstrip("\ufffd")
