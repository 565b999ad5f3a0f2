"""ChatGLM-6B: prompts that see themselves both ways, two rows of positions; and ChatGLM2 beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pingjia.chat import Tokenizer, load_tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.engine.kv import visible
from pingjia.errors import RequestError
from pingjia.models import load_model
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm_config import ChatGLMConfig
from pingjia.types import Completion, Grammar, Request, Sampling

FIXTURES = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm"
GMASK, SOP, EOP = 124, 126, 127
PROMPT_SAMPLING = Sampling(max_tokens=25)


def make_glm(seed: int = 0) -> ChatGLMForCausalLM:
    """Random weights, large enough that a wrong mask or position changes the answer."""
    config = ChatGLMConfig(
        vocab_size=128, hidden_size=48, num_layers=3, num_attention_heads=4, inner_hidden_size=64,
        max_sequence_length=512, mask_token_id=123, gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=EOP,
        tie_word_embeddings=False,
    )  # fmt: skip
    model, generator = ChatGLMForCausalLM(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5 + ("layernorm.weight" in name)
    return model.eval()


@pytest.fixture
def glm_tokenizer(letters: Tokenizer) -> Any:
    class GLMLetters(type(letters)):  # type: ignore[misc]
        stop_ids = frozenset({EOP})

        def render_text(self, text: str) -> list[int]:
            return [*self.encode(text), GMASK, SOP]

    return GLMLetters()


def some_prompts() -> list[str]:
    """Many share a beginning of several pages; two are equal."""
    rng = random.Random(0)
    beginning = "".join(chr(rng.randrange(32, 120)) for _ in range(40))
    ends = ["".join(chr(rng.randrange(32, 120)) for _ in range(rng.randrange(1, 30))) for _ in range(6)]
    return [beginning + end for end in ends] + ends[:3] + [beginning + ends[0]]


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "a budget smaller than every prompt": {"max_num_batched_tokens": 7},
    "preemption": {"page_size": 4, "kv_cache_tokens": 200},
    "no prefix cache": {"prefix_caching": False},
}


@pytest.fixture(scope="module")
def expected(reference: Callable[..., list[int]]) -> list[list[int]]:
    model = make_glm()
    return [reference(model, [*map(ord, p), GMASK, SOP], 25, frozenset({EOP})) for p in some_prompts()]


def ids_of(answers: list[Completion]) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_two_way_prompts_equal_generate(glm_tokenizer: Tokenizer, expected: list[list[int]], settings: Any) -> None:
    engine = Engine(make_glm(), tokenizer=glm_tokenizer, settings=EngineSettings(**settings))
    assert len({tuple(ids[:6]) for ids in expected}) == 9, "answers must differ, or a wrong mask would not show"
    for _ in range(2):
        assert ids_of(engine.generate(some_prompts(), PROMPT_SAMPLING)) == expected
    if "kv_cache_tokens" in settings:
        assert engine._scheduler.num_preemptions > 0
    elif settings.get("prefix_caching", True):
        assert engine.stats().cached_tokens_total > 0


def test_reusing_a_beginning_as_a_causal_family_may_is_caught(
    glm_tokenizer: Tokenizer, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: pages found again by the tokens before them alone. The comparison above must not survive it."""
    monkeypatch.setattr(Engine, "_root", lambda self, digest, prompt_ids: b"naive")
    engine = Engine(make_glm(), tokenizer=glm_tokenizer, settings=EngineSettings(max_num_seqs=1))
    assert ids_of(engine.generate(some_prompts(), PROMPT_SAMPLING)) != expected
    assert engine.stats().cached_tokens_total > 0


def conversations(count: int) -> list[str]:
    """Multi-turn prompts: each goes on with an earlier one, starts anew, or asks an earlier one again."""
    rng = random.Random(7)
    asked: list[str] = []
    for _ in range(count):
        turn = "".join(chr(rng.randrange(32, 120)) for _ in range(rng.randrange(3, 12))) + "|"
        kind = rng.random() if asked else 1.0
        earlier = rng.choice(asked) if asked else ""
        asked.append(earlier if kind < 0.2 else turn if kind > 0.9 or len(earlier) > 60 else earlier + turn)
    return asked


@pytest.mark.parametrize("kind", ["two-way", "causal"])
def test_a_thousand_conversations_are_answered_alike_with_and_without_reuse(
    kind: str, glm_tokenizer: Tokenizer, letters: Tokenizer, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted at the end: pages found by the tokens before them alone, which only causal families survive."""
    model, tokenizer = (make_glm(), glm_tokenizer) if kind == "two-way" else (tiny_model, letters)
    prompts, sampling = conversations(1000), Sampling(max_tokens=6)

    def answers(*, reuse: bool) -> list[list[int]]:
        settings = EngineSettings(page_size=4, prefix_caching=reuse, kv_cache_tokens=8192)
        engine = Engine(model, tokenizer=tokenizer, settings=settings)
        found = ids_of(engine.generate(prompts, sampling))
        assert (engine.stats().cached_tokens_total > 1000) == reuse
        return found

    plain = answers(reuse=False)
    assert len({tuple(ids) for ids in plain}) > 100
    assert answers(reuse=True) == plain
    monkeypatch.setattr(Engine, "_root", lambda self, digest, prompt_ids: b"naive")
    assert (answers(reuse=True) == plain) == (kind == "causal")


def test_a_prompt_without_the_marks_of_its_family_is_the_requests_fault(glm_tokenizer: Tokenizer) -> None:
    engine = Engine(make_glm(), tokenizer=glm_tokenizer)
    with pytest.raises(RequestError, match="must hold"):
        engine.add(Request("r", (65, 66, 67), Sampling()))
    assert not engine.has_work()


def test_what_a_token_may_see() -> None:
    assert visible(0, 4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 4, 0).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 5, 4).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(AssertionError, match="must not be cut"):
        visible(0, 3, 4)


# ---- trained networks of the published code


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.stream_answer()
    return decoder.feed(ids) + decoder.flush()


@pytest.mark.parametrize("name", ["tiny_v1_chat", "tiny_v1_chat_int8", "tiny_v1_chat_int4", "tiny_v2"])
def test_trained_chatglm_answers_alike_in_a_batch_and_alone(name: str, reference: Callable[..., list[int]]) -> None:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"no {name} in ../shared/fixtures/chatglm beside the repository")
    model, tokenizer = load_model(FIXTURES / name), load_tokenizer(FIXTURES / name)
    chats = [[{"role": "user", "content": text}] for text in ("你好", "介绍一下清华大学", "hello", "你好，你是谁？")]
    wanted = [reference(model, tokenizer.render(chat), 30, tokenizer.stop_ids) for chat in chats]
    engine = Engine(model, tokenizer=tokenizer, settings=EngineSettings(max_num_batched_tokens=9, page_size=4))
    for _ in range(2):
        answers = engine.generate(chats, Sampling(max_tokens=30))
        assert ids_of(answers) == wanted
        assert [a.text for a in answers] == [shown(tokenizer, ids) for ids in wanted]
    assert len({a.text for a in answers}) > 2


# ---- several answers, guesses and grammars


def test_n_answers_to_a_two_way_prompt_compute_it_once(glm_tokenizer: Any) -> None:
    drawn, prompt = Sampling(max_tokens=20, temperature=1.0, seed=3), "0123456789 " * 3
    settings = EngineSettings(page_size=4)
    alone = [
        Engine(make_glm(), tokenizer=glm_tokenizer, settings=settings).generate(prompt, replace(drawn, seed=3 + k))[0]
        for k in range(3)
    ]
    engine = Engine(make_glm(), tokenizer=glm_tokenizer, settings=settings)
    answers = engine.generate(prompt, replace(drawn, n=3))
    assert ids_of(answers) == ids_of(alone)
    assert len({a.token_ids for a in answers}) == 3
    assert [a.usage.cached_tokens for a in answers] == [0, *[answers[0].usage.prompt_tokens] * 2]


def test_guesses_change_no_answer_to_a_two_way_prompt(glm_tokenizer: Any) -> None:
    prompts, sampling = ["a", "hello", "x y z " * 4], Sampling(max_tokens=100, ignore_eos=True)
    engines = [
        Engine(make_glm(), tokenizer=glm_tokenizer, settings=EngineSettings(page_size=4, prompt_lookup=how))
        for how in ("auto", "off")
    ]
    guessing, plain = (ids_of(engine.generate(prompts, sampling)) for engine in engines)
    assert guessing == plain
    assert engines[0].num_right_guesses > 20
    assert engines[1].num_guesses == 0


@pytest.mark.parametrize("name", ["tiny_v1_chat", "tiny_v2"])
def test_json_with_chinese_from_a_sentencepiece_vocabulary(name: str) -> None:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"no {name} in ../shared/fixtures/chatglm beside the repository")
    model, tokenizer = load_model(FIXTURES / name), load_tokenizer(FIXTURES / name)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["你好", "大学"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a", "n"],
        "additionalProperties": False,
    }
    held = Sampling(max_tokens=400, temperature=1.0, seed=1, n=8, grammar=Grammar.schema(schema))
    engine = Engine(model, tokenizer=tokenizer, settings=EngineSettings(page_size=4))
    answers = engine.generate([{"role": "user", "content": "你好"}], held)
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert len(ended) > 4
    for answer in ended:
        assert json.loads(answer.text)["a"] in ("你好", "大学")
        assert 0 <= json.loads(answer.text)["n"] <= 99
