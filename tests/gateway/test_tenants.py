"""Nobody ever sees a word of another tenant: random histories of keys that ask, stream, ask later, upload and batch.

Every text a tenant sends, and so every answer it gets, carries its own mark. Two keys belong to one tenant and may see
each other's; nobody else may. The backend repeats what it was asked, so that an answer from a wrong place is seen.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import httpx
import pytest
from gateway_fakes import ByteTokenizer, FakeBackend, Script
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pingjia.gateway.keys import KeyFile
from pingjia.types import ModelCard

KEYS = {"ann": "red", "bob": "red", "cat": "", "dan": "blue"}  # name -> tenant
MARKS = {"ann": "RED", "bob": "RED", "cat": "CAT", "dan": "BLUE"}
QUESTIONS = ("7天内可以退货吗", "where is my order", "OK")
RULES = {"zh": {"system": "用中文"}, "en": {"system": "in English"}}


class Echo(FakeBackend):
    """Says what it was asked, word for word. Its weights are known, so that answers are kept."""

    def __init__(self, rest_s: float) -> None:
        tokenizer = ByteTokenizer()
        super().__init__(script=Script(text=lambda request: tokenizer.decode(request.prompt_ids), first_s=rest_s))
        self.cards = [ModelCard("base", "/models/base", None, 4096, 1_700_000_000, "b" * 64)]


class World:
    """A server, its clients, and what belongs to whom."""

    def __init__(self, start: Any, folder: Any, redis_url: str | None) -> None:
        file = KeyFile(folder / "keys.json")
        secrets = {name: file.create(name, tenant=tenant).secret for name, tenant in KEYS.items()}
        options: dict[str, Any] = {"keys_file": str(file.path), "redis_url": redis_url, "files_dir": str(folder)}
        self.server = start(backend=Echo(0.002), language={"rules": RULES}, **options)
        self.clients = {
            name: httpx.Client(base_url=self.server.url, headers={"authorization": f"Bearer {key}"}, timeout=30)
            for name, key in secrets.items()
        }
        self.seen_cache: set[str] = set()

    def ask(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask; whatever comes back holds nobody else's mark."""
        response = self.clients[who].request(method, path, **options)
        text = response.text + str(response.headers)
        wrong = [mark for mark in set(MARKS.values()) - {MARKS[who]} if f"<{mark}>" in text]
        assert not wrong, f"{who} saw {wrong} in {method} {path}: {text}"
        assert response.status_code < 500, text
        self.seen_cache.add(response.headers.get("x-cache", ""))
        return response


def chat(who: str, question: str, **fields: Any) -> dict[str, Any]:
    """Equal questions of different tenants are equal texts but for the mark, which stands in an earlier turn.

    `shared`: without any mark, so that the cache must keep tenants apart by itself.
    """
    first = f"I am <{MARKS[who]}>"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": "hm"}]
    return {"model": "base", "messages": [*messages, {"role": "user", "content": question}], **fields}


def machine(world: World) -> type[RuleBasedStateMachine]:
    seeds = itertools.count(1)
    whos, questions = st.sampled_from(sorted(KEYS)), st.sampled_from(QUESTIONS)

    class Histories(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.ids: list[tuple[str, str, str]] = []  # whose, what kind, its id
            self.asked: set[tuple[str, str]] = set()
            self.seed = next(seeds)  # of this history alone: what earlier ones asked is still kept

        @rule(who=whos, question=questions, stream=st.booleans(), control=st.sampled_from(["", "no-cache", "no-store"]))
        def asks(self, who: str, question: str, stream: bool, control: str) -> None:
            body = chat(who, question, stream=stream)
            answer = world.ask(who, "POST", "/v1/chat/completions", json=body, headers={"cache-control": control})
            assert f"<{MARKS[who]}>" in answer.text.replace("\\u003c", "<") or stream

        @rule(who=whos, question=questions)
        def asks_what_others_ask_too(self, who: str, question: str) -> None:
            """Word for word the same for all: a tenant's first one is never another's kept answer."""
            body = {"model": "base", "messages": [{"role": "user", "content": question}], "seed": self.seed}
            answer = world.ask(who, "POST", "/v1/chat/completions", json=body)
            known = (MARKS[who], question) in self.asked
            assert known or answer.headers["x-cache"] != "HIT", (who, question)
            self.asked.add((MARKS[who], question))

        @rule(who=whos, question=questions, key=st.sampled_from(["", "k1", "k2"]))
        def asks_for_later(self, who: str, question: str, key: str) -> None:
            headers = {"prefer": "respond-async", "idempotency-key": key}
            answer = world.ask(who, "POST", "/v1/chat/completions", json=chat(who, question), headers=headers)
            if answer.status_code == 202:
                self.ids.append((who, "jobs", answer.json()["id"]))
            else:
                assert answer.status_code == 409, answer.text

        @rule(who=whos, question=questions)
        def uploads(self, who: str, question: str) -> None:
            line = {"custom_id": f"<{MARKS[who]}>", "method": "POST", "url": "/v1/chat/completions"}
            data = json.dumps({**line, "body": chat(who, question)}).encode()
            form = {"file": (f"<{MARKS[who]}>.jsonl", data)}
            answer = world.ask(who, "POST", "/v1/files", files=form, data={"purpose": "batch"})
            self.ids.append((who, "files", answer.json()["id"]))

        @precondition(lambda self: any(kind == "files" for _, kind, _ in self.ids))
        @rule(who=whos, data=st.data())
        def begins_a_batch(self, who: str, data: st.DataObject) -> None:
            owner, _, file_id = data.draw(st.sampled_from([i for i in self.ids if i[1] == "files"]))
            body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            answer = world.ask(who, "POST", "/v1/batches", json=body)
            assert (answer.status_code == 200) == (MARKS[who] == MARKS[owner]), answer.text
            if answer.status_code == 200:
                self.ids.append((who, "batches", answer.json()["id"]))

        @precondition(lambda self: self.ids)
        @rule(who=whos, data=st.data(), tail=st.sampled_from(["", "/content", "/cancel"]))
        def looks_at_an_id(self, who: str, data: st.DataObject, tail: str) -> None:
            owner, kind, id_ = data.draw(st.sampled_from(self.ids))
            tail = tail if (kind, tail) in (("files", "/content"), ("batches", "/cancel")) else ""
            method = "POST" if tail == "/cancel" else "GET"
            answer = world.ask(who, method, f"/v1/{kind}/{id_}{tail}")
            assert answer.status_code == (200 if MARKS[who] == MARKS[owner] else 404), answer.text

        @precondition(lambda self: self.ids)
        @rule(who=whos, data=st.data())
        def removes_an_id(self, who: str, data: st.DataObject) -> None:
            owner, kind, id_ = data.draw(st.sampled_from([i for i in self.ids if i[1] == "jobs"] or self.ids))
            if MARKS[who] != MARKS[owner] and kind != "batches":
                assert world.ask(who, "DELETE", f"/v1/{kind}/{id_}").status_code == 404

        @precondition(lambda self: any(kind == "batches" for _, kind, _ in self.ids))
        @rule(data=st.data())
        def reads_what_a_batch_wrote(self, data: st.DataObject) -> None:
            owner, _, id_ = data.draw(st.sampled_from([i for i in self.ids if i[1] == "batches"]))
            end = time.monotonic() + 10
            while (batch := world.ask(owner, "GET", f"/v1/batches/{id_}").json())["status"] in (
                "validating",
                "in_progress",
            ):
                assert time.monotonic() < end
                time.sleep(0.02)
            for file_id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
                assert f"<{MARKS[owner]}>" in world.ask(owner, "GET", f"/v1/files/{file_id}/content").text
                self.ids.append((owner, "files", file_id))

        @rule(who=whos, path=st.sampled_from(["/v1/files", "/v1/batches", "/v1/models"]))
        def lists(self, who: str, path: str) -> None:
            world.ask(who, "GET", path)

        @rule(who=whos)
        def purges(self, who: str) -> None:
            assert world.ask(who, "DELETE", "/v1/cache").status_code == 200
            other = world.ask(who, "DELETE", "/v1/cache?tenant=" + ("blue" if MARKS[who] != "BLUE" else "red"))
            assert other.status_code == 403
            self.asked = {pair for pair in self.asked if pair[0] != MARKS[who]}

        @invariant()
        def nothing_of_it_is_in_the_metrics(self) -> None:
            text = world.clients["cat"].get("/metrics").text
            assert not any(f"<{mark}>" in text for mark in MARKS.values())

    return Histories


_histories = settings(
    max_examples=12, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_nobody_sees_anothers_words_in_one_process(start, tmp_path):
    world = World(start, tmp_path, None)
    run_state_machine_as_test(machine(world), settings=_histories)
    assert {"HIT", "MISS", "BYPASS"} <= world.seen_cache


def test_nobody_sees_anothers_words_over_redis(start, tmp_path, redis):
    world = World(start, tmp_path, redis.url)
    run_state_machine_as_test(machine(world), settings=settings(_histories, max_examples=6))
    assert {"HIT", "MISS", "BYPASS"} <= world.seen_cache


def test_equal_questions_at_the_same_time_are_computed_once_for_each_tenant(start, tmp_path):
    """Those of one tenant share what is under way; another tenant's question is its own, though word for word equal."""
    from concurrent.futures import ThreadPoolExecutor

    world = World(start, tmp_path, None)
    world.server.backend.script.first_s = 0.3
    body = {"model": "base", "messages": [{"role": "user", "content": "the same"}]}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(world.ask, who, "POST", "/v1/chat/completions", json=body) for who in [*KEYS, *KEYS]]
    assert {a.result().status_code for a in asked} == {200}
    assert len(world.server.backend.requests) == len(set(MARKS.values()))


@pytest.mark.parametrize("path", ["/v1/jobs/job-{}", "/v1/files/file-{}", "/v1/batches/batch_{}"])
def test_an_id_of_another_and_one_that_never_was_look_alike(start, tmp_path, path):
    world = World(start, tmp_path, None)
    answer = world.ask("cat", "GET", path.format("0" * 32))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
