"""Bytes and bodies of other servers, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.errors import RequestError, UpstreamBusy, UpstreamFailed
from pingjia.gateway.replicas import LeastOutstanding, Replica
from pingjia.gateway.upstream_affinity import TextAffinity
from pingjia.gateway.upstream_events import AnswerReader, EventReader, refusal
from pingjia.gateway.upstream_merge import merged_chat, merged_text
from pingjia.gateway.upstream_tokens import Correction, estimate_prompt, estimate_tokens
from pingjia.types import Passed, Request, Sampling

ASKED = Request("r", (), Sampling())


@given(
    st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
    st.lists(st.integers(1, 9), max_size=60),
)
def test_events_are_the_same_however_their_bytes_are_cut(texts: list[str], end: bytes, sizes: list[int]) -> None:
    stream = b": ping" + end + end
    for text in texts:
        stream += b"event: x" + end + b"data: " + text.encode() + end + end
    reader, found = EventReader(), []
    for size in sizes:
        found += list(reader.feed(stream[:size]))
        stream = stream[size:]
    found += list(reader.feed(stream))
    assert [data.decode() for data in found] == texts


def test_data_of_several_lines_is_one_event() -> None:
    assert list(EventReader().feed(b'data: {"a":\ndata:1}\n\n')) == [b'{"a":\n1}']


@given(st.lists(st.sampled_from(["a", "你", '"', "\n", " "]), max_size=30))
def test_the_pieces_are_the_answer(pieces: list[str]) -> None:
    reader, chunks = AnswerReader(), []
    for piece in pieces:
        chunks.append(reader.read(json.dumps({"choices": [{"delta": {"content": piece}}]}).encode()))
    reader.read(b'{"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"prompt_tokens": 7}}')
    last = reader.end()
    assert "".join(c.text for c in chunks if c) == "".join(pieces)
    assert last.finish_reason == "length"
    assert last.usage
    assert last.usage.prompt_tokens == 7


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_fail_readably(data: bytes) -> None:
    reader = AnswerReader()
    try:
        for event in EventReader().feed(b"data: " + data + b"\n\n"):
            reader.read(event)
            reader.read_whole(event)
        reader.end()
    except (UpstreamFailed, RequestError):
        pass


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "message",
                    "tool_calls",
                    "index",
                    "function",
                    "usage",
                    "error",
                    "text",
                    "finish_reason",
                    "logprobs",
                    "prompt_tokens",
                    "prompt_tokens_details",
                    "object",
                    "arguments",
                    "role",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(_VALUES, st.booleans())
def test_no_document_does_anything_but_fail_readably(document: Any, is_whole: bool) -> None:
    reader = AnswerReader()
    data = json.dumps(document).encode()
    try:
        chunk = reader.read_whole(data) if is_whole else reader.read(data)
        last = reader.end()
    except (UpstreamFailed, RequestError):
        return
    for merge in (merged_chat, merged_text):
        merge([c.foreign or json.dumps({"text": c.text}) for c in (chunk, last) if c])


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestError), (422, RequestError), (413, RequestError), (401, UpstreamFailed), (404, UpstreamFailed),
     (429, UpstreamBusy), (503, UpstreamBusy), (500, UpstreamFailed), (307, UpstreamFailed), (200, UpstreamFailed)],
)  # fmt: skip
def test_what_a_status_amounts_to(status: int, kind: type) -> None:
    assert type(refusal(status, b'{"error": {"message": "m"}}', None)) is kind


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "too long", "code": "c", "param": "p"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"object": "error", "message": "old vllm", "code": 400}', "old vllm"),
        (b'{"detail": "fastapi"}', "fastapi"),
        (b"<html>\n nginx \n</html>", "<html> nginx </html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "no reason given"),
        (b"{}", "no reason given"),
    ],
)
def test_complaints_of_all_kinds_are_read(body: bytes, words: str) -> None:
    assert words in str(refusal(400, body, None))


def test_a_key_is_cut_out_of_a_complaint() -> None:
    assert "sk-1" not in str(refusal(400, b'{"error": {"message": "bad sk-1"}}', None, "sk-1"))


def test_merging_adds_texts_and_arguments_and_keeps_the_rest() -> None:
    pieces = [
        {"delta": {"reasoning_content": "a"}},
        {"text": "x"},
        {"delta": {"reasoning_content": "b", "content": "y"}, "logprobs": {"content": [1]}},
        {"delta": {"tool_calls": [{"index": 0, "id": "i", "function": {"name": "f", "arguments": "{"}}]}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}, "logprobs": {"content": [2]}},
        {"delta": {}, "finish_reason": "tool_calls"},
    ]
    assert merged_chat(map(json.dumps, pieces)) == {
        "message": {
            "role": "assistant", "content": "xy", "reasoning_content": "ab",
            "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": "{}"}}],
        },
        "logprobs": {"content": [1, 2]},
        "finish_reason": "tool_calls",
    }  # fmt: skip


def test_merging_completions_joins_their_logprobs() -> None:
    one = {"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}
    found = merged_text([json.dumps(one), json.dumps({"text": "b"}), json.dumps(one)])
    assert found["text"] == "aba"
    assert found["logprobs"] == {"tokens": ["a", "a"], "token_logprobs": [-1.0, -1.0]}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.floats(0.1, 9)), min_size=1, max_size=8))
def test_the_least_loaded_for_its_weight_is_chosen(rows: list[tuple[int, int, float]]) -> None:
    replicas = [Replica(str(i), weight, out, begun) for i, (out, begun, weight) in enumerate(rows)]
    chosen = LeastOutstanding().choose(replicas, ASKED)
    assert all((chosen.num_outstanding + 1) / chosen.weight <= (r.num_outstanding + 1) / r.weight for r in replicas)


@given(st.text(max_size=50), st.text(max_size=50))
def test_a_longer_text_is_not_estimated_shorter(a: str, b: str) -> None:
    assert 1 <= estimate_tokens(a) <= estimate_tokens(a + b)
    assert estimate_prompt([a, b]) > estimate_prompt([a])


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), max_size=50))
def test_a_correction_stays_within_bounds(counts: list[tuple[int, int]]) -> None:
    correction = Correction()
    for estimated, counted in counts:
        correction.learn(estimated, counted)
    assert 0.25 <= correction.factor <= 4.0


def test_the_number_of_tokens_does_not_tell_questions_apart() -> None:
    assert repr(Passed("p", "{}", 3)) == repr(Passed("p", "{}", 4))


def _turns(*texts: str) -> Request:
    messages = [{"role": "user", "content": text} for text in texts]
    return Request("r", (), Sampling(), "big", Passed("chat/completions", json.dumps({"messages": messages})))


def test_a_conversation_stays_with_its_server_and_short_ones_are_spread() -> None:
    policy, replicas = TextAffinity(), [Replica(f"http://{i}/v1") for i in range(5)]
    chosen = set()
    for i in range(30):
        first = f"{i} " + "long beginning " * 60
        names = {policy.choose(replicas, _turns(first, *["more"] * turns)).name for turns in range(4)}
        assert len(names) == 1
        chosen |= names
    assert len(chosen) > 2
    busy = [Replica("a", num_outstanding=3), Replica("b")]
    assert policy.choose(busy, _turns("hi")).name == "b"
    assert policy.choose(busy, ASKED).name == "b"


def test_a_busy_server_is_left_by_its_conversation() -> None:
    policy, replicas = TextAffinity(), [Replica(f"http://{i}/v1") for i in range(3)]
    asked = _turns("beginning " * 100)
    home = policy.choose(replicas, asked)
    crowded = [Replica(r.name, num_outstanding=20 if r.name == home.name else 0) for r in replicas]
    assert policy.choose(crowded, asked).name != home.name
