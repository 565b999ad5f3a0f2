"""What is written of each request: one fact in the ledger, one line in the access log, never a word of the content."""

from __future__ import annotations

import json
import logging

import pytest
from gateway_fakes import Script

from pingjia.errors import EngineError
from pingjia.ledger import Ledger


@pytest.fixture
def billed(start, tmp_path):
    return start(ledger=Ledger(tmp_path / "ledger.jsonl"))


def facts(gateway):
    return list(gateway.ledger.read(kind="serve.request"))


def test_a_fact_per_request(billed):
    billed.backend.script = Script(text="abc", first_s=0.05, token_s=0.01)
    usage = billed.chat(model="shop").json()["usage"]
    (fact,) = facts(billed)
    assert (fact.prompt_tokens, fact.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (fact.cached_tokens, fact.num_requests, fact.who) == (1, 1, "")
    assert (fact.note["model"], fact.note["status"], fact.note["finish_reason"]) == ("shop", 200, "stop")
    assert 0.05 <= fact.note["ttft"] < fact.seconds


def test_several_choices_are_one_fact(billed):
    billed.backend.script = Script(text=lambda r: "ab" if r.sampling.seed == 1 else "abcdef")
    billed.chat(n=2, seed=1, max_tokens=4)
    (fact,) = facts(billed)
    assert (fact.completion_tokens, fact.note["finish_reason"]) == (6, "stop,length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_answer_has_a_fact_with_its_status(billed, stream):
    billed.backend.script = Script(text="abcdef", raise_after=3, error=EngineError("broken"))
    billed.chat(stream=stream)
    (fact,) = facts(billed)
    assert (fact.note["status"], fact.note["finish_reason"], fact.completion_tokens) == (500, "error", 3)


def test_what_was_never_taken_on_has_none(billed):
    billed.chat(temperature="hot")
    billed.chat(model="x")
    billed.chat("x" * 5000)
    billed.backend.ready = False
    billed.chat()
    assert facts(billed) == []


def test_a_ledger_that_cannot_be_written_does_not_fail_the_answer(start, tmp_path, caplog):
    gateway = start(ledger=Ledger(tmp_path))  # a directory
    assert gateway.chat().status_code == 200
    assert "refused a fact" in caplog.text
    assert '"completion_tokens": 13' in caplog.text  # the numbers are in the log instead
    assert "pingjia_ledger_errors_total 1.0" in gateway.http.get("/metrics").text


def access_lines(caplog):
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "pingjia.access"]


def test_the_access_log(gateway, caplog, eventually):
    caplog.set_level(logging.INFO, "pingjia.access")
    request_id = gateway.chat("top secret", max_tokens=6).headers["x-request-id"]
    eventually(lambda: len(access_lines(caplog)) == 1, "the line")
    (line,) = access_lines(caplog)
    assert (line["request_id"], line["method"], line["path"]) == (request_id, "POST", "/v1/chat/completions")
    assert (line["status"], line["model"], line["finish_reason"]) == (200, "base", "length")
    assert (line["completion_tokens"], line["client"]) == (6, "127.0.0.1")
    assert line["seconds"] >= line["ttft"] > 0
    assert "secret" not in caplog.text
    assert "你好" not in caplog.text


def test_the_access_log_leaves_out_query_strings_and_healthy_probes(gateway, caplog, eventually):
    caplog.set_level(logging.INFO, "pingjia.access")
    gateway.http.get("/health")
    gateway.http.get("/v1/models?api_key=sk-hidden")
    gateway.backend.ready = False
    gateway.http.get("/health")
    eventually(lambda: len(access_lines(caplog)) >= 2, "the lines")
    assert [(line["path"], line["status"]) for line in access_lines(caplog)] == [("/v1/models", 200), ("/health", 503)]
    assert "sk-hidden" not in caplog.text


def test_a_path_cannot_forge_a_second_line(gateway, caplog, eventually):
    caplog.set_level(logging.INFO, "pingjia.access")
    gateway.http.get('/x%0A{"status":200}')
    eventually(lambda: len(access_lines(caplog)) == 1, "the line")
    assert "\n" not in next(r.getMessage() for r in caplog.records if r.name == "pingjia.access")
