"""/tokenize and /detokenize say what the model is given."""

from __future__ import annotations

import json

import pytest
from gateway_fakes import BOS

USER = [{"role": "user", "content": "你好"}]
TOOL = {"type": "function", "function": {"name": "clock"}}


def tokenize(gateway, **body):
    response = gateway.http.post("/tokenize", json={"model": "base", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text(gateway):
    answer = tokenize(gateway, prompt="hé")
    assert (answer["tokens"][0], answer["count"], answer["max_model_len"]) == (BOS, 4, 4096)
    assert tokenize(gateway, prompt="hé", add_special_tokens=False)["tokens"] == answer["tokens"][1:]
    assert tokenize(gateway, prompt="h", return_token_strs=True)["token_strs"] == ["<s>", "h"]
    assert "token_strs" not in answer


def test_a_conversation_is_what_a_chat_gives_the_model(gateway):
    for tools in ([], [TOOL]):
        gateway.chat("你好", tools=tools)
        told = tuple(tokenize(gateway, messages=USER, tools=tools)["tokens"])
        assert told == gateway.backend.requests[-1].prompt_ids
    assert len(tokenize(gateway, messages=USER, add_generation_prompt=False)["tokens"]) < len(told)


def test_there_and_back(gateway):
    ids = tokenize(gateway, prompt="你好, wörld")["tokens"]
    answer = gateway.http.post("/detokenize", json={"model": "base", "tokens": ids})
    assert answer.json() == {"prompt": "你好, wörld"}
    assert gateway.http.post("/detokenize", json={"model": "base", "tokens": []}).json() == {"prompt": ""}


def test_a_long_text_does_not_hold_up_the_others(gateway):
    gateway.tokenizer.threads.clear()
    tokenize(gateway, messages=[{"role": "user", "content": "x" * 20_000}])
    assert gateway.tokenizer.threads[0].startswith("render")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": USER, "tools": [1]}, "tools[0]"),
        ("/tokenize", {"messages": USER, "tools": [{}]}, "tools"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_refused_naming_the_field(gateway, path, body, param):
    data = json.dumps({"model": "base", **body})
    response = gateway.http.post(path, content=data, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_404(gateway, path):
    response = gateway.http.post(path, json={"model": "x", "prompt": "x", "tokens": []})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
