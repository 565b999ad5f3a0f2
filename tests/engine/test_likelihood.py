"""How likely an answer is: equal to the log-probabilities of generation, and to a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pingjia.chat import Tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.errors import RequestError
from pingjia.types import Example, Likelihood, Message, Request, Sampling

Model = tuple[PreTrainedModel, Tokenizer]
CHAT = [Message("user", "What is the capital of France?")]


@pytest.fixture(scope="module")
def engine(smollm2: Model) -> Engine:
    model, tokenizer = smollm2
    return Engine(model, tokenizer=tokenizer, settings=EngineSettings())


def test_a_greedy_answer_is_as_likely_as_generation_says(engine: Engine) -> None:
    (said,) = engine.generate([CHAT], Sampling(max_tokens=24, logprobs=0))
    (found,) = engine.likelihoods([CHAT], [said.text])
    assert found.is_greedy
    assert found.num_tokens == len(said.logprobs)  # the end is one of them
    assert found.logprob == pytest.approx(sum(token.logprob for token in said.logprobs), abs=1e-3)
    (without,) = engine.likelihoods([CHAT], [said.text], with_end=False)
    assert without.num_tokens == found.num_tokens - 1
    assert without.logprob > found.logprob


def test_any_answer_is_as_likely_as_a_plain_pass_says(smollm2: Model, engine: Engine) -> None:
    model, tokenizer = smollm2
    answers = ["Berlin, I think.", "巴黎", "P"]
    found = engine.likelihoods([CHAT] * 3, answers)
    for answer, one in zip(answers, found, strict=True):
        encoded = tokenizer.encode_example(Example((*CHAT, Message("assistant", answer))))
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            logprobs = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        model.set_attn_implementation(before)
        learnt = [i for i, learn in enumerate(encoded.learn) if learn]
        assert one.num_tokens == len(learnt)
        assert one.logprob == pytest.approx(sum(float(logprobs[i - 1, encoded.ids[i]]) for i in learnt), abs=2e-3)
        assert not one.is_greedy


def test_raw_text_and_pages_given_back(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine(kv_cache_tokens=64)
    free = engine.stats().kv_tokens_used
    one, two = engine.likelihoods(["abc", "abc"], ["def", "de"], with_end=False)
    (rest,) = engine.likelihoods(["abcde"], ["f"], with_end=False)
    assert one.num_tokens == 3
    assert one.logprob == pytest.approx(two.logprob + rest.logprob, abs=1e-5)
    assert engine.stats().kv_tokens_used == free


def test_it_disturbs_no_request_that_runs(tiny_engine: Callable[..., Engine]) -> None:
    def answer(between: bool) -> list[int]:
        engine, ids = tiny_engine(), []
        engine.add(Request("r", (1, 70, 71, 72), Sampling(max_tokens=20, ignore_eos=True)))
        while engine.has_work():
            for _, chunk in engine.step():
                ids += chunk.token_ids
            if between:
                engine.likelihoods(["FGH"], ["xyz"], with_end=False)
        return ids

    assert answer(True) == answer(False)


def test_what_has_no_likelihood(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine(kv_cache_tokens=512)
    with pytest.raises(RequestError, match="without a single token"):
        engine.likelihoods(["abc"], [""])
    with pytest.raises(RequestError, match="together"):
        engine.likelihoods(["a" * 400], ["b" * 200])
    seen: list[tuple[int, Likelihood]] = []
    found = engine.likelihoods(["a", "b"], ["c", "d"], on_done=lambda i, one: seen.append((i, one)))
    assert seen == list(enumerate(found))


def test_two_way_prompts(letters: Any) -> None:
    from pingjia.models.chatglm import ChatGLMForCausalLM
    from pingjia.models.chatglm_config import ChatGLMConfig

    class GLMLetters(type(letters)):  # type: ignore[misc]
        stop_ids = frozenset({127})

        def render_text(self, text: str) -> list[int]:
            return [*self.encode(text), 124, 126]

    torch.manual_seed(1)
    config = ChatGLMConfig(
        vocab_size=128, hidden_size=48, num_layers=2, num_attention_heads=4, inner_hidden_size=64,
        max_sequence_length=512, mask_token_id=123, gmask_token_id=124, bos_token_id=126, eos_token_id=127,
        tie_word_embeddings=False,
    )  # fmt: skip
    engine = Engine(ChatGLMForCausalLM(config).eval(), tokenizer=GLMLetters())
    letters_only = tuple((token, -100.0) for token in (0, 1, 2, 123, 124, 125, 126, 127))
    (said,) = engine.generate(["hello"], Sampling(max_tokens=6, logprobs=0, logit_bias=letters_only))
    (found,) = engine.likelihoods(["hello"], [said.text], with_end=False)
    assert len(said.text) == 6
    assert found.logprob == pytest.approx(sum(token.logprob for token in said.logprobs), abs=1e-4)
