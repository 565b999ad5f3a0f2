"""Prefer: respond-async: taken on with 202, asked for later, seen by nobody else."""

from __future__ import annotations

import pytest
from gateway_fakes import Script

from pingjia.gateway import hash_key
from pingjia.ledger import Ledger

ASYNC = {"prefer": "respond-async"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def post(gateway, path="/v1/chat/completions", body=CHAT, **headers):
    return gateway.http.post(path, json=body, headers={**ASYNC, **headers})


def wait_for(gateway, eventually, url, **headers):
    seen = {}

    def is_over():
        seen.update(gateway.http.get(url, headers=headers).json())
        return seen["status"] not in ("queued", "running")

    eventually(is_over, "the job ends")
    return seen


def test_a_job_is_taken_on_and_its_result_is_what_a_direct_answer_is(gateway, eventually):
    direct = gateway.chat().json()
    response = post(gateway)
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    assert response.json()["status"] in ("queued", "running")
    job = wait_for(gateway, eventually, response.headers["location"])
    assert job["status"] == "completed"
    result = {**job["result"], "id": None, "created": None}
    assert result == {**direct, "id": None, "created": None}
    assert gateway.http.get(response.headers["location"]).json() == job, "it can be read again"


def test_several_choices_and_raw_prompts(gateway, eventually):
    body = {"model": "base", "prompt": ["a", "b"], "n": 2, "logprobs": 1}
    job = wait_for(gateway, eventually, post(gateway, "/v1/completions", body).headers["location"])
    assert [c["index"] for c in job["result"]["choices"]] == [0, 1, 2, 3]
    assert job["result"]["choices"][3]["logprobs"]["tokens"]


def test_a_failure_has_the_error_of_a_direct_answer(gateway, eventually):
    gateway.backend.script = Script(error_text="no memory left", finish="error")
    job = wait_for(gateway, eventually, post(gateway).headers["location"])
    assert (job["status"], job["error"]["code"]) == ("failed", "engine_error")
    assert job["error"]["message"] == "no memory left"


def test_cancelling_stops_the_work(gateway, eventually):
    gateway.backend.script = Script(text="x" * 3000, token_s=0.002)
    url = post(gateway, body={**CHAT, "max_tokens": 3000}).headers["location"]
    eventually(lambda: gateway.backend.num_tokens > 3, "it runs")
    assert gateway.http.get(url).json()["status"] == "running"
    assert gateway.http.delete(url).json()["status"] == "cancelled"
    eventually(lambda: gateway.backend.running == 0, "the work stops")
    assert gateway.http.get(url).json()["status"] == "cancelled"
    assert gateway.http.delete(url).json()["status"] == "cancelled"


def test_the_same_idempotency_key_is_the_same_job(gateway):
    first = post(gateway, **{"idempotency-key": "k1"}).json()
    assert post(gateway, **{"idempotency-key": "k1"}).json()["id"] == first["id"]
    assert post(gateway, **{"idempotency-key": "k2"}).json()["id"] != first["id"]
    assert len(gateway.backend.requests) <= 2
    other = post(gateway, body={**CHAT, "max_tokens": 3}, **{"idempotency-key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_gateway_that_died_between_mark_and_queue_does_not_spoil_the_key(gateway, eventually, monkeypatch):
    jobs = gateway.app.state.jobs

    async def dies(ask, caller):
        monkeypatch.undo()
        monkeypatch.setattr(jobs._queue, "remove", nothing)
        raise RuntimeError("kill -9")

    async def nothing(kind, record_id):
        monkeypatch.undo()

    monkeypatch.setattr(jobs, "_submit", dies)
    assert post(gateway, **{"idempotency-key": "k9"}).status_code == 500
    again = post(gateway, **{"idempotency-key": "k9"})
    assert wait_for(gateway, eventually, again.headers["location"])["status"] == "completed"


def test_what_is_wrong_is_refused_at_once(gateway):
    assert post(gateway, body={**CHAT, "model": "nothing"}).status_code == 404
    assert post(gateway, body={**CHAT, "stream": True}).json()["error"]["param"] == "stream"
    assert post(gateway, body={**CHAT, "max_tokens": 10**6}).json()["error"]["code"] == "context_length_exceeded"
    assert gateway.http.get("/v1/jobs/job-none").json()["error"]["code"] == "not_found"
    assert gateway.http.get("/v1/jobs/job-none").status_code == 404
    assert gateway.http.delete("/v1/jobs/job-none").status_code == 404


def test_another_key_sees_nothing_of_it(start, eventually):
    gateway = start(api_keys=[hash_key("one"), hash_key("two")])
    one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    url = post(gateway, **one).headers["location"]
    assert wait_for(gateway, eventually, url, **one)["status"] == "completed"
    for answer in (gateway.http.get(url, headers=two), gateway.http.delete(url, headers=two)):
        assert answer.status_code == 404
    assert gateway.http.get(url).status_code == 401
    mine, theirs = (post(gateway, **{**who, "idempotency-key": "k"}).json()["id"] for who in (one, two))
    assert mine != theirs


def test_a_full_queue_takes_nothing_on(start, eventually):
    gateway = start(queue_max_requests=2, max_concurrent=1)
    gateway.backend.script = Script(held=True)
    post(gateway)
    eventually(lambda: gateway.backend.running == 1, "one is begun")
    urls = [post(gateway).headers["location"] for _ in range(2)]
    refused = post(gateway, **{"idempotency-key": "again"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    gateway.backend.script.held = False
    assert all(wait_for(gateway, eventually, url)["status"] == "completed" for url in urls)
    assert post(gateway, **{"idempotency-key": "again"}).status_code == 202, "a refusal does not use the key up"


def test_each_job_is_one_fact(start, eventually, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    gateway = start(ledger)
    url = post(gateway, body={**CHAT, "n": 2}).headers["location"]
    wait_for(gateway, eventually, url)
    eventually(lambda: len(list(ledger.read())) == 1, "it is brought to account")
    (fact,) = ledger.read(kind="serve.request")
    assert (fact.completion_tokens, fact.num_requests, fact.note["job"]) == (
        2 * len("你好, world".encode()),
        1,
        url[9:],
    )


@pytest.mark.parametrize("above", [0.0, 5.0])
def test_above_the_measured_rate_requests_take_the_queue(start, above):
    gateway = start(queue_above_rps=above)
    answers = [gateway.chat().json()["choices"][0]["message"]["content"] for _ in range(12)]
    assert set(answers) == {"你好, world"}
    taken = gateway.app.state.service.roads.num_taken
    assert taken["queue"] > 0
    assert (taken["direct"] > 0) == (above > 0)
