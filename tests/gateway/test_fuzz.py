"""Bodies nobody would write: never a 5xx, never a hang, always the envelope."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MESSAGE = {"role": "user", "content": "x"}
VALID = {
    "/v1/chat/completions": {
        "model": "base", "messages": [MESSAGE], "temperature": 0.5, "top_p": 0.9, "n": 1, "max_tokens": 2, "seed": 1,
        "stop": ["a"], "stream": False, "logprobs": True, "top_logprobs": 1, "stop_token_ids": [1], "user": "u",
        "stream_options": None, "top_k": 1, "logit_bias": {}, "tools": None, "response_format": {"type": "text"},
    },
    "/v1/completions": {
        "model": "base", "prompt": "x", "temperature": 0.5, "logprobs": 1, "n": 1, "max_tokens": 2, "stop": "a",
        "stream": False, "echo": False, "suffix": None, "best_of": 1,
    },
    "/": {"prompt": "x", "history": [["a", "b"]], "max_length": 100, "top_p": 0.5, "temperature": 0.5, "model": "base"},
}  # fmt: skip

_text = st.text(st.characters(exclude_categories=()), max_size=6)  # half surrogates too
_numbers = st.sampled_from([0, 1, -1, 2, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, -0.0, 1e-300])
_leaf = st.none() | st.booleans() | st.integers() | st.floats() | _text | _numbers
_json = st.recursive(_leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(_text, x, max_size=3), max_leaves=6)
_part = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]) | _json}, optional={"text": _json})
_message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "tool", "assistant"]) | _json, "content": st.lists(_part) | _json}
)
_value = _json | st.lists(_message, max_size=3)

_fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def check(gateway, path: str, data: bytes) -> None:
    response = gateway.http.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (data, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", list(VALID))
@_fuzz
@given(data=st.data())
def test_valid_bodies_with_some_fields_replaced(gateway, path, data):
    keys = st.lists(st.sampled_from(sorted(VALID[path])) | _text, min_size=1, max_size=2)
    body = {**VALID[path], **{key: data.draw(_value, label=key) for key in data.draw(keys, label="keys")}}
    check(gateway, path, json.dumps(body).encode())


@pytest.mark.parametrize("path", list(VALID))
@_fuzz
@given(data=st.data())
def test_valid_bodies_with_bytes_changed(gateway, path, data):
    body = bytearray(json.dumps(VALID[path]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    check(gateway, path, bytes(body))
