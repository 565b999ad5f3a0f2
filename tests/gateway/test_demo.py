"""POST /: what was written for ChatGLM-6B's demo server."""

from __future__ import annotations

import json
import re

import pytest


def test_first_turn_with_the_published_defaults(gateway):
    answer = gateway.http.post("/", json={"prompt": "你好", "history": [], "model": "base"})
    body = answer.json()
    assert answer.status_code == 200
    assert (body["response"], body["status"]) == ("你好, world", 200)
    assert body["history"] == [["你好", "你好, world"]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", body["time"])
    request = gateway.backend.requests[-1]
    assert (request.sampling.top_p, request.sampling.temperature, request.sampling.top_k) == (0.7, 0.95, 50)
    assert request.sampling.max_tokens == 2048 - len(request.prompt_ids)


def test_history_comes_first_and_comes_back(gateway):
    body = gateway.http.post(
        "/", json={"prompt": "c", "history": [["a", "b"]], "max_length": 60, "temperature": 0, "model": "base"}
    ).json()
    assert body["history"] == [["a", "b"], ["c", "你好, world"]]
    request = gateway.backend.requests[-1]
    assert gateway.tokenizer.decode(request.prompt_ids) == "user: a\nassistant: b\nuser: c\nassistant: "
    assert request.sampling.max_tokens == 60 - len(request.prompt_ids)
    assert request.sampling.temperature == 0


def test_null_means_default_and_the_default_model_answers(start):
    gateway = start(default_model="shop")
    body = {"prompt": "a", "history": None, "max_length": None, "top_p": None, "temperature": None}
    assert gateway.http.post("/", json=body).status_code == 200
    assert gateway.backend.requests[-1].adapter == "shop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud83d"}, "prompt"),
        ({"history": [["only one"]]}, "history[0]"),
        ({"history": [["a", 5]]}, "history[0][1]"),
        ({"history": "x"}, "history"),
        ({"max_length": 5}, "prompt"),
        ({"top_p": 2}, "top_p"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_refused_naming_the_field(gateway, fields, param):
    data = json.dumps({"prompt": "a", "model": "base", **fields})
    response = gateway.http.post("/", content=data, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_max_length_below_the_prompt_says_both_numbers(gateway):
    message = gateway.http.post("/", json={"prompt": "abc", "model": "base", "max_length": 5}).json()["error"][
        "message"
    ]
    assert "22 tokens" in message
    assert "max_length is 5" in message
