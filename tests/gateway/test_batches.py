"""/v1/files and /v1/batches with OpenAI's own client: every line answered once, and nobody sees another's."""

from __future__ import annotations

import json
import resource
from collections import Counter

import openai
import pytest
from gateway_fakes import Script

from pingjia.gateway import hash_key

ONE = {"authorization": "Bearer one"}


def line(name, endpoint="/v1/chat/completions", **body):
    body = {"model": "base", "messages": [{"role": "user", "content": name}], "max_tokens": 40, **body}
    return {"custom_id": name, "method": "POST", "url": endpoint, "body": body}


def text_of(lines):
    return "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines).encode()


def run(gateway, lines, key="none", endpoint="/v1/chat/completions"):
    client = gateway.openai(api_key=key)
    file = client.files.create(file=("in.jsonl", text_of(lines)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    return client, batch.id


def finish(client, batch_id, eventually, status="completed"):
    eventually(lambda: client.batches.retrieve(batch_id).status in ("completed", "failed", "cancelled"), "it ends", 20)
    batch = client.batches.retrieve(batch_id)
    assert batch.status == status, batch
    return batch


def rows(client, file_id):
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


@pytest.fixture
def batching(start, tmp_path):
    def begin(**settings):
        return start(files_dir=str(tmp_path / "state"), **settings)

    return begin


def echo(gateway):
    gateway.backend.script = Script(text=lambda r: gateway.tokenizer.decode(r.prompt_ids).split("user: ")[1][:7])


def test_every_line_is_answered_once_with_its_id(batching, eventually):
    gateway = batching()
    echo(gateway)
    client, batch_id = run(gateway, [line(f"q-{i:05}") for i in range(70)])
    batch = finish(client, batch_id, eventually)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (70, 70, 0)
    assert batch.error_file_id is None
    answers = rows(client, batch.output_file_id)
    assert Counter(row["custom_id"] for row in answers) == Counter(f"q-{i:05}" for i in range(70))
    for row in answers:
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["choices"][0]["message"]["content"] == row["custom_id"]
    assert [b.id for b in client.batches.list()] == [batch_id]
    assert {f.purpose for f in client.files.list()} == {"batch", "batch_output"}


def test_wrong_lines_are_told_apart_and_the_others_answered(batching, eventually):
    gateway = batching()
    lines = [
        line("good"),
        "{no json\n",
        "[1]\n",
        line("good"),
        {"custom_id": "nobody", "method": "POST", "url": "/v1/chat/completions"},
        line("model", model="nothing"),
        line("type", temperature="hot"),
        line("stream", stream=True),
        line("long", max_tokens=10**6),
        {"method": "POST", "body": {}},
        "\n",
        line("fine"),
    ]
    client, batch_id = run(gateway, lines)
    batch = finish(client, batch_id, eventually)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (11, 2, 9)
    errors = {row["line"]: row for row in rows(client, batch.error_file_id)}
    codes = {number: row["response"]["body"]["error"]["code"] for number, row in errors.items()}
    assert codes == {
        2: "invalid_line", 3: "invalid_line", 4: "invalid_line", 5: "invalid_line", 10: "invalid_line",
        6: "model_not_found", 7: "invalid_value", 8: "invalid_value", 9: "context_length_exceeded",
    }  # fmt: skip
    assert "line 2 is not valid JSON" in errors[2]["error"]["message"]
    assert "used by an earlier line" in errors[4]["error"]["message"]
    assert errors[6]["response"]["status_code"] == 404
    assert errors[7]["response"]["body"]["error"]["param"] == "temperature"


def test_raw_prompts_too(batching, eventually):
    gateway = batching()
    lines = [{"custom_id": "a", "method": "POST", "body": {"model": "base", "prompt": ["x", "y"], "max_tokens": 3}}]
    client, batch_id = run(gateway, lines, endpoint="/v1/completions")
    (row,) = rows(client, finish(client, batch_id, eventually).output_file_id)
    assert len(row["response"]["body"]["choices"]) == 2


def test_cancelling_keeps_what_is_there(batching, eventually):
    gateway = batching()
    gateway.backend.script = Script(text="x" * 40, token_s=0.02)
    client, batch_id = run(gateway, [line(f"q{i}") for i in range(200)])
    eventually(lambda: client.batches.retrieve(batch_id).request_counts.completed > 5, "some are answered", 20)
    assert client.batches.cancel(batch_id).status == "cancelling"
    batch = finish(client, batch_id, eventually, "cancelled")
    assert 5 < batch.request_counts.completed < 200
    assert len(rows(client, batch.output_file_id)) == batch.request_counts.completed
    eventually(lambda: gateway.backend.running == 0, "the work stops")


def test_a_restart_goes_on_and_answers_nothing_twice(batching, eventually):
    first = batching()
    first.backend.script = Script(text="x" * 20, token_s=0.01)
    client, batch_id = run(first, [line(f"q{i}") for i in range(120)])
    eventually(lambda: client.batches.retrieve(batch_id).request_counts.completed > 20, "some are answered", 20)
    first.server.should_exit = True
    first.thread.join(10)
    num_first = len(first.backend.requests)
    second = batching()
    client = second.openai()
    batch = finish(client, batch_id, eventually)
    assert batch.request_counts.completed == 120
    answers = rows(client, batch.output_file_id)
    assert Counter(row["custom_id"] for row in answers) == Counter(f"q{i}" for i in range(120))
    assert len(second.backend.requests) < 120
    assert num_first + len(second.backend.requests) <= 120 + 32


def test_a_half_written_line_is_written_again(tmp_path):
    from pingjia.gateway.batches import _done

    path = tmp_path / "out"
    path.write_bytes(b'{"line": 1}\n{"line": 4}\n{"li')
    assert _done(path) == {1, 4}
    assert path.read_bytes() == b'{"line": 1}\n{"line": 4}\n'


def test_a_full_disk_fails_the_batch_with_the_reason(batching, eventually):
    """The kernel refuses to let any file grow beyond 20 kB, as a full disk would."""
    gateway = batching()
    client, batch_id = run(gateway, [line(f"q{i}", messages=[{"role": "user", "content": "x"}]) for i in range(80)])
    finish(client, batch_id, eventually)
    gateway.backend.script = Script(text="y" * 35)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        client, batch_id = run(gateway, [line(f"q{i}") for i in range(80)])
        batch = finish(client, batch_id, eventually, "failed")
        assert 0 < batch.request_counts.completed < 80
        assert "the disk refused" in batch.errors.data[0].message
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("big.jsonl", b"x" * 50_000), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = rows(client, batch.output_file_id)
    assert len(kept) == batch.request_counts.completed, "what was answered before is kept, whole"
    assert gateway.chat().status_code == 200


def test_another_key_sees_nothing(batching, eventually):
    gateway = batching(api_keys=[hash_key("one"), hash_key("two")])
    one, batch_id = run(gateway, [line("secret")], key="one")
    batch = finish(one, batch_id, eventually)
    two = gateway.openai(api_key="two")
    for ask in (
        lambda: two.batches.retrieve(batch_id),
        lambda: two.batches.cancel(batch_id),
        lambda: two.files.retrieve(batch.input_file_id),
        lambda: two.files.content(batch.output_file_id),
        lambda: two.files.delete(batch.input_file_id),
        lambda: two.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert list(two.batches.list()) == []
    assert list(two.files.list()) == []
    assert one.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        one.files.retrieve(batch.input_file_id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 32, "file-x/../y"])
def test_ids_lead_nowhere_else(batching, name):
    gateway = batching()
    assert gateway.http.get(f"/v1/files/{name}/content").status_code == 404
    assert gateway.http.get(f"/v1/batches/{name}").status_code == 404


def test_uploads_are_bounded_and_checked(batching):
    gateway = batching(max_file_bytes=10_000)
    send = gateway.http.post
    too_large = send("/v1/files", files={"file": ("a", b"x" * 20_000)}, data={"purpose": "batch"})
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")
    far_too_large = send("/v1/files", files={"file": ("a", b"x" * 200_000)}, data={"purpose": "batch"})
    assert far_too_large.status_code == 413
    wrong = send("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "fine-tune"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "purpose")
    assert send("/v1/files", data={"purpose": "batch"}).status_code == 400
    assert send("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert send("/v1/files", json={}).status_code == 400
    assert gateway.http.get("/v1/files").json()["data"] == []


def test_an_empty_file_fails_with_the_reason(batching, eventually):
    client, batch_id = run(batching(), ["\n"])
    assert "empty" in finish(client, batch_id, eventually, "failed").errors.data[0].message


def test_unknown_endpoints_and_files_are_refused(batching):
    gateway = batching()
    body = {"input_file_id": "file-none", "endpoint": "/v1/chat/completions"}
    assert gateway.http.post("/v1/batches", json=body).status_code == 404
    wrong = gateway.http.post("/v1/batches", json={**body, "endpoint": "/v1/embeddings"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "endpoint")
