"""/v1/completions."""

from __future__ import annotations

import pytest
from gateway_fakes import FIRST_BYTE, Script


def test_raw_prompt(gateway):
    answer = gateway.openai().completions.create(model="base", prompt="Once", max_tokens=6)
    choice = answer.choices[0]
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", "你好", "length")
    assert gateway.tokenizer.decode(gateway.backend.requests[-1].prompt_ids) == "Once"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)


def test_stream(gateway):
    options = {"include_usage": True}
    events = list(gateway.openai().completions.create(model="base", prompt="Once", stream=True, stream_options=options))
    assert "".join(e.choices[0].text for e in events[:-1]) == "你好, world"
    assert [e.choices[0].finish_reason for e in events[:-1]][-2:] == [None, "stop"]
    assert (events[-1].choices, events[-1].usage.completion_tokens) == ([], 13)


def test_several_prompts_times_n(gateway):
    gateway.backend.script = Script(text=lambda r: f"{gateway.tokenizer.decode(r.prompt_ids)}{r.sampling.seed}")
    answer = gateway.openai().completions.create(model="base", prompt=["a", "bb"], n=2, seed=3)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a3"), (1, "a4"), (2, "bb3"), (3, "bb4")]
    assert answer.usage.prompt_tokens == 2 + 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize(("prompt", "expected"), [([104, 105], [(104, 105)]), ([[104], [105]], [(104,), (105,)])])
def test_token_ids_go_in_as_they_are(gateway, prompt, expected):
    gateway.openai().completions.create(model="base", prompt=prompt)
    assert [r.prompt_ids for r in gateway.backend.requests] == expected


def test_logprobs(gateway):
    logprobs = gateway.openai().completions.create(model="base", prompt="x", logprobs=2).choices[0].logprobs
    assert "".join(logprobs.tokens) == "你好, world"
    assert logprobs.token_logprobs == [-0.5] * 13
    assert logprobs.top_logprobs[-1] == {"d": -0.5, "z": -9999.0}
    assert logprobs.text_offset[:7] == [0, 0, 0, 1, 1, 1, 2]


def test_streamed_logprobs_go_on_counting_offsets(gateway):
    events = gateway.openai().completions.create(model="base", prompt="x", logprobs=0, stream=True)
    offsets = [offset for e in events for offset in e.choices[0].logprobs.text_offset]
    assert offsets == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [256 + FIRST_BYTE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_refused_naming_the_field(gateway, fields, param):
    response = gateway.http.post("/v1/completions", json={"model": "base", "prompt": "x", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert gateway.backend.requests == []
