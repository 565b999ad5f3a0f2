"""The result cache over HTTP: what is given again, to whom, in which form, and when never."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import signal
import threading

import pytest
from gateway_fakes import ByteTokenizer, FakeBackend, Script

from pingjia.errors import EngineError
from pingjia.gateway import cache_store
from pingjia.gateway.cache import Wish
from pingjia.gateway.cache_store import MemoryStore, RedisStore
from pingjia.gateway.keys import KeyFile
from pingjia.ledger import Ledger
from pingjia.types import ModelCard

CARDS = [
    ModelCard("base", "/models/base", None, 4096, 1, digest="b1"),
    ModelCard("shop", "/adapters/shop", "base", 4096, 2, digest="s1"),
]


def echo(request):
    """An answer that says exactly what was asked, by what."""
    asked = ByteTokenizer().decode(request.prompt_ids)
    return f"{request.adapter}|{request.sampling.seed}|{request.sampling.temperature}|{asked}"


@pytest.fixture(params=["memory", "redis"])
def cached(request, start, tmp_path, monkeypatch):
    """A server whose cards have digests, over both stores; its ledger beside it."""
    monkeypatch.setattr(cache_store, "_ANSWER_S", 2.0)  # a busy machine is not a lost Redis
    url = request.getfixturevalue("redis").url if request.param == "redis" else None

    def make(**settings):
        backend = FakeBackend(Script(text=echo), list(CARDS))
        return start(ledger=Ledger(tmp_path / "l.jsonl"), backend=backend, redis_url=url, **settings)

    return make


def text(response):
    return response.json()["choices"][0]["message"]["content"]


def x_cache(response):
    return response.headers.get("x-cache")


def streamed(gateway, content="hi", **fields):
    body = {"model": "base", "messages": [{"role": "user", "content": content}], "stream": True, **fields}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    return response, events


def test_the_second_time_nothing_is_computed(cached):
    gateway = cached()
    first, second = gateway.chat(max_tokens=99), gateway.chat(max_tokens=99)
    assert (x_cache(first), x_cache(second)) == ("MISS", "HIT")
    assert text(first) == text(second)
    assert first.json()["choices"] == second.json()["choices"]
    assert first.json()["id"] != second.json()["id"]
    assert second.headers["age"] == "0"
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert {k: usage[k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: first.json()["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    }
    assert len(gateway.backend.requests) == 1


def test_whole_and_streamed_answers_share_it(cached):
    gateway = cached()
    whole = text(gateway.chat("平价" * 20, max_tokens=999))
    response, events = streamed(gateway, "平价" * 20, max_tokens=999, stream_options={"include_usage": True})
    assert x_cache(response) == "HIT"
    deltas = [e["choices"][0]["delta"] for e in events if e["choices"]]
    assert "".join(d.get("content", "") for d in deltas) == whole
    assert deltas[0]["role"] == "assistant"
    assert len(deltas) > 5  # a stream still
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == len(whole.encode())
    assert len(gateway.backend.requests) == 1


def test_a_streamed_answer_is_kept_too(cached):
    gateway = cached()
    _, events = streamed(gateway, max_tokens=99)
    assert x_cache(gateway.chat(max_tokens=99)) == "HIT"
    assert len(events) > 5


def test_logprobs_come_back(cached):
    gateway = cached()
    answers = [gateway.chat(max_tokens=9, logprobs=True, top_logprobs=2).json()["choices"][0] for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[1]["logprobs"]["content"][0]["top_logprobs"]


def test_completions_are_cached_too(cached):
    gateway = cached()
    bodies = [
        {"model": "base", "prompt": ["ab", "cd"], "max_tokens": 50},
        {"model": "base", "prompt": "cd", "max_tokens": 50},
    ]
    answers = [gateway.http.post("/v1/completions", json=body) for body in bodies]
    assert [x_cache(a) for a in answers] == ["MISS", "HIT"]
    assert answers[0].json()["choices"][1]["text"] == answers[1].json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "outcomes"),
    [
        ({"temperature": 0.7}, ["BYPASS", "BYPASS"]),
        ({"temperature": 0.7, "n": 2}, ["BYPASS", "BYPASS"]),
        ({"temperature": 0.7, "seed": 3}, ["MISS", "HIT"]),
        ({"temperature": 0.7, "seed": 3, "n": 2}, ["MISS", "HIT"]),
    ],
)
def test_only_what_must_come_out_equal_is_kept(cached, fields, outcomes):
    gateway = cached()
    answers = [gateway.chat(max_tokens=200, **fields) for _ in range(2)]
    assert [x_cache(a) for a in answers] == outcomes
    if outcomes[1] == "HIT":
        assert answers[0].json()["choices"] == answers[1].json()["choices"]


@pytest.mark.parametrize(
    ("header", "outcome", "then"),
    [
        ("no-store", "BYPASS", "HIT"),
        ("no-cache", "MISS", "HIT"),
        ("max-age=0", "MISS", "HIT"),
        ("max-age=100, stale-if-error", "HIT", "HIT"),
        ("No-Cache", "MISS", "HIT"),
        ("nonsense", "HIT", "HIT"),
    ],
)
def test_what_a_client_may_say(cached, header, outcome, then):
    gateway = cached()
    gateway.chat()
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    said = gateway.http.post("/v1/chat/completions", json=body, headers={"cache-control": header})
    assert (x_cache(said), x_cache(gateway.chat())) == (outcome, then)


def test_no_store_is_not_kept(cached):
    gateway = cached()
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    gateway.http.post("/v1/chat/completions", json=body, headers={"cache-control": "no-store"})
    assert x_cache(gateway.chat()) == "MISS"


def test_wishes():
    assert Wish.of("") == Wish()
    assert Wish.of("max-age=5, max-age=9") == Wish(max_age_s=5)
    assert Wish.of("no-store, max-age=5") == Wish(False, False, 5)


def test_an_adapter_replaced_under_its_name_is_asked_anew(cached):
    gateway = cached()
    gateway.backend.script = Script(text="old")
    assert text(gateway.chat(model="shop")) == "old"
    gateway.backend.script = Script(text="new")
    assert text(gateway.chat(model="shop")) == "old"
    gateway.backend.cards[1] = dataclasses.replace(CARDS[1], digest="s2", created=3)
    assert text(gateway.chat(model="shop")) == "new"
    gateway.backend.cards[0] = dataclasses.replace(CARDS[0], digest="b2")
    gateway.backend.script = Script(text="newest")
    assert text(gateway.chat(model="shop")) == "newest"


@pytest.mark.parametrize("card", [0, 1])
def test_what_was_answered_while_weights_changed_is_not_kept(cached, card, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="half old", held=True)
    thread = threading.Thread(target=lambda: gateway.chat(model="shop"))
    thread.start()
    eventually(lambda: gateway.backend.running == 1, "it runs")
    gateway.backend.cards[card] = dataclasses.replace(CARDS[card], digest="x", created=9)
    gateway.backend.script.held = False
    thread.join()
    gateway.backend.cards[card] = CARDS[card]
    assert x_cache(gateway.chat(model="shop")) == "MISS"


def test_unknown_weights_are_never_kept(start):
    gateway = start(backend=FakeBackend(Script(text=echo)))
    assert [x_cache(gateway.chat()) for _ in range(2)] == ["BYPASS", "BYPASS"]


def test_off_is_off(cached):
    gateway = cached(cache={"enabled": False})
    assert [x_cache(gateway.chat()) for _ in range(2)] == [None, None]
    assert len(gateway.backend.requests) == 2


def test_a_failed_answer_is_not_kept(cached):
    gateway = cached()
    gateway.backend.script = Script(text="abcdef", raise_after=3, error=EngineError("broken"))
    assert gateway.chat().status_code == 500
    gateway.backend.script = Script(text="abcdef", finish="cancelled")
    assert gateway.chat().status_code == 503
    gateway.backend.script = Script(text="abcdef", error_text="odd")
    gateway.chat()
    gateway.backend.script = Script(text="abcdef")
    assert x_cache(gateway.chat()) == "MISS"


def test_what_was_cut_off_is_not_kept(cached, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="x" * 500, token_s=0.01)
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for _ in zip(range(4), response.iter_lines(), strict=False):
            pass
    eventually(lambda: len(gateway.backend.cancelled) == 1, "the backend was told")
    gateway.backend.script = Script(text="y")
    assert (x_cache(answer := gateway.chat()), text(answer)) == ("MISS", "y")


# ---- equal questions at one time


def at_once(num, ask):
    answers = [None] * num
    threads = [threading.Thread(target=lambda i=i: answers.__setitem__(i, ask(i))) for i in range(num)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_ten_at_once_are_computed_once(cached, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="ok" * 20, held=True)
    threads, answers = at_once(10, lambda i: gateway.chat() if i % 2 else streamed(gateway)[0])
    eventually(lambda: len(gateway.app.state.service._answers) == 10, "all wait")
    gateway.backend.script.held = False
    for thread in threads:
        thread.join()
    assert len(gateway.backend.requests) == 1
    assert sorted(x_cache(a) for a in answers) == ["HIT"] * 9 + ["MISS"]
    free = [f.note.get("cache") for f in gateway.ledger.read(kind="serve.request")]
    assert free.count("hit") == 9


def test_the_first_leaves_and_the_others_have_all_of_it(cached, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="0123456789", token_s=0.05)
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    leader = gateway.raw("/v1/chat/completions", body)
    eventually(lambda: gateway.backend.running == 1, "it runs")
    threads, answers = at_once(3, lambda _: gateway.chat())
    eventually(lambda: len(gateway.app.state.service._answers) == 4, "they follow")
    leader.close()
    for thread in threads:
        thread.join()
    assert [text(a) for a in answers] == ["0123456789"] * 3
    assert len(gateway.backend.requests) == 1
    assert gateway.backend.cancelled == []
    facts = list(gateway.ledger.read(kind="serve.request"))
    assert sorted((f.note["status"], f.note.get("cache", "")) for f in facts) == [
        (200, ""),  # who was next in line pays for what the leader left
        (200, "hit"),
        (200, "hit"),
        (499, ""),
    ]


def test_when_all_leave_the_backend_stops(cached, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="abc", freeze_after=1)
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    socks = [gateway.raw("/v1/chat/completions", body) for _ in range(3)]
    eventually(lambda: len(gateway.app.state.service._answers) == 3, "all wait")
    for sock in socks:
        sock.close()
    eventually(lambda: gateway.backend.running == 0, "the backend is idle")
    assert len(gateway.backend.cancelled) == 1


def test_a_follower_does_not_fail_with_the_leader_before_anything_came(cached, eventually):
    gateway = cached()
    gateway.backend.script = Script(text="abc", held=True, raise_after=0, error=EngineError("its own trouble"))
    threads, answers = at_once(2, lambda _: gateway.chat())
    eventually(lambda: len(gateway.app.state.service._answers) == 2, "both wait")
    first, gateway.backend.script = gateway.backend.script, Script(text="abc")
    first.held = False
    for thread in threads:
        thread.join()
    assert sorted(a.status_code for a in answers) == [200, 500]


# ---- owners


@pytest.fixture
def tenants(cached, tmp_path):
    """A server with keys: a and b alone, c and d of one tenant, root. ask(name, content)."""
    file = KeyFile(tmp_path / "keys.json")
    made = {name: file.create(name, tenant=t) for name, t in {"a": "", "b": "", "c": "team", "d": "team"}.items()}
    made["root"] = file.create("root", admin=True)
    gateway = cached(keys_file=str(file.path))

    def call(name, method, path, **options):
        return gateway.http.request(method, path, headers={"authorization": f"Bearer {made[name].secret}"}, **options)

    def ask(name, content="hi", **fields):
        body = {"model": "base", "messages": [{"role": "user", "content": content}], **fields}
        return call(name, "POST", "/v1/chat/completions", json=body)

    ask.call, ask.gateway, ask.ids = call, gateway, {name: new.key.id for name, new in made.items()}
    return ask


def test_owners_do_not_share_and_tenants_do(tenants):
    outcomes = {name: x_cache(tenants(name)) for name in ("a", "b", "c", "d", "a")}
    assert outcomes == {"a": "HIT", "b": "MISS", "c": "MISS", "d": "HIT"}
    assert x_cache(tenants("b")) == "HIT"


def test_never_the_text_of_another(tenants):
    """Random questions, keys, models and sampling against a backend that says what it was asked and numbers it."""
    num = [0]

    def numbered(request):
        num[0] += 1
        return f"{num[0]}|{echo(request)}"

    tenants.gateway.backend.script = Script(text=numbered)
    random.seed(7)
    whose: dict[str, str] = {}
    for _ in range(150):
        name = random.choice("abcd")
        owner = "team" if name in "cd" else name
        content, model = random.choice(["x", "x ", "y", "x\n"]), random.choice(["base", "shop"])
        fields = random.choice([{}, {"seed": 1}, {"seed": 2, "temperature": 1.0}, {"top_p": 0.5}, {"stop": ["\x00"]}])
        answer = tenants(name, content, model=model, max_tokens=300, **fields)
        number, adapter, seed, temperature, asked = text(answer).split("|")
        assert asked == f"user: {content}\nassistant: "
        assert adapter == ("shop" if model == "shop" else "None")
        assert seed == str(fields.get("seed"))
        assert float(temperature) == fields.get("temperature", 0)
        assert whose.setdefault(number, owner) == owner
    assert num[0] < 150


def test_purging_is_for_ones_own(tenants):
    for name in ("a", "b", "c"):
        tenants(name)
    assert tenants.call("a", "DELETE", "/v1/cache").json() == {"object": "cache.purged", "num_answers": 1}
    assert [x_cache(tenants(name)) for name in ("a", "b", "c")] == ["MISS", "HIT", "HIT"]
    assert tenants.call("d", "DELETE", "/v1/cache?tenant=team").json()["num_answers"] == 1
    assert x_cache(tenants("c")) == "MISS"


@pytest.mark.parametrize("query", ["?tenant=team", "?all=true", "?key={b}"])
def test_purging_others_takes_an_admin(tenants, query):
    for name in ("a", "b", "c"):
        tenants(name)
    query = query.format(**tenants.ids)
    refused = tenants.call("a", "DELETE", f"/v1/cache{query}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert [x_cache(tenants(name)) for name in ("a", "b", "c")] == ["HIT"] * 3
    assert tenants.call("root", "DELETE", f"/v1/cache{query}").json()["num_answers"] == (3 if "all" in query else 1)


def test_what_is_under_way_while_purging_is_not_kept(tenants, eventually):
    gateway = tenants.gateway
    gateway.backend.script = Script(text="ok", held=True)
    thread = threading.Thread(target=lambda: tenants("a"))
    thread.start()
    eventually(lambda: gateway.backend.running == 1, "it runs")
    tenants.call("a", "DELETE", "/v1/cache")
    gateway.backend.script.held = False
    thread.join()
    assert x_cache(tenants("a")) == "MISS"


# ---- what it costs and saves


def test_a_hit_is_written_down_and_costs_nothing(cached):
    from pingjia.cost import bill
    from pingjia.cost.settings import CostSettings

    gateway = cached()
    gateway.backend.script = Script(text="abc", first_s=0.2)
    gateway.chat(), gateway.chat()
    facts = list(gateway.ledger.read(kind="serve.request"))
    assert [f.note.get("cache") for f in facts] == [None, "hit"]
    assert facts[1].note["share_s"] == 0
    (share,) = bill(facts, CostSettings(price_per_hour=3600)).shares
    assert (share.num_requests, share.num_cache_hits) == (2, 1)
    assert 0.19 < float(share.cost) <= facts[0].seconds + 1e-6
    metrics = gateway.http.get("/metrics").text
    assert 'pingjia_cache_requests_total{outcome="hit"} 1.0' in metrics
    saved = next(line for line in metrics.splitlines() if line.startswith("pingjia_cache_saved_seconds_total"))
    assert float(saved.split()[1]) >= 0.19


def test_a_hit_takes_no_tokens_of_the_limit(tenants, tmp_path):
    secret = KeyFile(tmp_path / "keys.json").create("limited", tokens_per_minute=300).secret
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
    answers = [
        tenants.gateway.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"})
        for _ in range(6)
    ]
    assert [x_cache(a) for a in answers] == ["MISS"] + ["HIT"] * 5


# ---- the stores


async def test_memory_is_bounded_in_size_and_age():
    clock = [0.0]
    store = MemoryStore(100_000, 60, lambda: clock[0])
    for i in range(100):
        await store.put("a", str(i), bytes(5_000))
        await store.get("a", "0")  # used again and again, so it stays
        assert store.num_bytes <= 100_000
    kept = [i for i in range(100) if await store.get("a", str(i)) is not None]
    assert 0 in kept
    assert kept[1:] == list(range(100 - len(kept) + 1, 100))
    clock[0] = 61
    assert await store.get("a", "99") is None
    await store.put("a", "big", bytes(50_000))
    assert await store.get("a", "big") is None


async def test_redis_is_bounded_in_size_and_age(redis):
    store = RedisStore(redis.url, 100_000, 60)
    for i in range(60):
        await store.put("a", str(i), bytes(5_000))
        await store.get("a", "0")
    kept = [i for i in range(60) if await store.get("a", str(i)) is not None]
    assert 0 in kept
    assert kept[1:] == list(range(60 - len(kept) + 1, 60))
    assert len(kept) * 5_400 == int(await store._redis.get("pingjia:cache:bytes")) <= 100_000
    assert await store._redis.hlen("pingjia:cache:sizes") == len(kept)
    assert await store.purge("b") == 0
    assert await store.purge("a") == len(kept)
    assert int(await store._redis.get("pingjia:cache:bytes")) == 0
    await store.close()


async def test_redis_forgets_by_age_and_keeps_its_books(redis):
    store = RedisStore(redis.url, 100_000, 0.05)
    await store.put("a", "k", b"x")
    await store.put("a", "k", b"xy")
    await asyncio.sleep(0.1)
    assert await store.get("a", "k") is None
    assert int(await store._redis.get("pingjia:cache:bytes")) == 0
    assert await store._redis.zcard("pingjia:cache:order") == 0
    await store.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_redis_answers_are_computed(start, redis, how):
    gateway = start(backend=FakeBackend(Script(text=echo), list(CARDS)), redis_url=redis.url, queue_above_rps=1e9)
    gateway.chat()
    assert x_cache(gateway.chat()) == "HIT"
    if how == "killed":
        redis.stop()
    else:
        redis.signal(signal.SIGSTOP)
    answers = [gateway.chat() for _ in range(3)]
    assert [(a.status_code, x_cache(a)) for a in answers] == [(200, "MISS")] * 3
    if how == "frozen":
        redis.signal(signal.SIGCONT)


def test_a_damaged_entry_is_a_miss(start, redis, eventually):
    gateway = start(backend=FakeBackend(Script(text=echo), list(CARDS)), redis_url=redis.url)
    gateway.chat()
    from redis import Redis

    client = Redis.from_url(redis.url)
    eventually(lambda: client.keys("pingjia:cache:answer:*"), "the answer is kept")
    (name,) = client.keys("pingjia:cache:answer:*")
    client.set(name, b"[1, 2, [[")
    assert x_cache(gateway.chat()) == "MISS"
    assert x_cache(gateway.chat()) == "HIT"
