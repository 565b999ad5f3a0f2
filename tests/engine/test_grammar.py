"""Answers held to a grammar: whatever a random network samples fits it, and the other answers are left alone."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel

from pingjia.chat import Tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.engine import grammar as grammars
from pingjia.engine.grammar import DeadEnd, Grammars
from pingjia.errors import EngineError, RequestError
from pingjia.types import Chunk, Completion, Grammar, Request, Sampling

MakeEngine = Callable[..., Engine]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def ask(engine: Engine, grammar: Grammar, seed: int = 0, **fields: Any) -> Completion:
    fields = {"max_tokens": 400, "temperature": 1.0} | fields
    return engine.generate("say", Sampling(seed=seed, grammar=grammar, **fields))[0]


# ---- whatever is sampled fits


NAMES = st.text("abcxyz_", min_size=1, max_size=6)
SCALARS = st.one_of(
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-99, 99),
              st.integers(0, 50)),
    st.builds(lambda least, size: {"type": "string", "minLength": least, "maxLength": least + size}, st.integers(0, 3),
              st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(NAMES, min_size=1, max_size=4, unique=True)),
    st.sampled_from([
        {"type": "boolean"}, {"type": "null"}, {"const": "x"}, {"type": "string", "pattern": "^[a-c]{1,4}-[0-9]{2}$"},
        {"type": "number", "minimum": 0, "maximum": 1},
    ]),
)  # fmt: skip


def objects(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(objects, st.dictionaries(NAMES, inner, min_size=1, max_size=4), st.sets(NAMES, max_size=2)),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


SCHEMAS = st.recursive(SCALARS, larger, max_leaves=6)


@pytest.fixture(scope="module")
def random_engine(make_tiny: Callable[..., LlamaForCausalLM], letters: Tokenizer) -> Engine:
    return Engine(make_tiny(), tokenizer=letters, settings=EngineSettings(max_num_seqs=4))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 2**31))
def test_a_random_network_under_a_random_schema_writes_what_validates(
    random_engine: Engine, schema: dict[str, Any], seed: int
) -> None:
    answer = ask(random_engine, Grammar.schema(schema), seed)
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)
    else:
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 400)


def test_most_answers_do_end(random_engine: Engine) -> None:
    answers = [ask(random_engine, Grammar.schema(PERSON), seed) for seed in range(30)]
    assert [a.finish_reason for a in answers] == ["stop"] * 30
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), PERSON)
    assert len({a.text for a in answers}) > 20


def test_any_object_parses(random_engine: Engine) -> None:
    answers = [ask(random_engine, Grammar("json_object"), seed) for seed in range(10)]
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(a.text), dict) for a in ended)


@pytest.mark.parametrize("pattern", ["[a-c]{3,9}", "(yes|no), [0-9]{1,4}(\\.[0-9]+)?", "^x+y$", "a\\$", "(ab?c)*d"])
def test_the_whole_answer_matches_a_regular_expression(random_engine: Engine, pattern: str) -> None:
    for seed in range(5):
        answer = ask(random_engine, Grammar.regex(pattern), seed)
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, answer.text)


def test_the_answer_is_one_of_the_choices(random_engine: Engine) -> None:
    choices = ["yes", "no", "(may.be)", "no idea", "\\d+$"]
    said = {ask(random_engine, Grammar.choice(choices), seed).text for seed in range(60)}
    assert said <= set(choices)
    assert len(said) >= 4


def test_greedy_takes_the_likeliest_of_what_is_allowed(
    tiny_engine: MakeEngine, make_tiny: Callable[..., LlamaForCausalLM], letters: Tokenizer
) -> None:
    (token,) = ask(tiny_engine(), Grammar.regex("[0-9]"), temperature=0.0).token_ids
    model = make_tiny()
    logits_V = model(torch.tensor([letters.render_text("say")])).logits[0, -1]
    assert token == 48 + int(logits_V[48:58].argmax())


def test_an_answer_ends_with_its_last_token_where_nothing_may_follow(random_engine: Engine) -> None:
    answer = ask(random_engine, Grammar.choice(["yes"]))
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("yes", 3, "stop")


def test_a_cut_answer_says_so(random_engine: Engine) -> None:
    answer = ask(random_engine, Grammar.regex("[a-c]{50}"), max_tokens=7)
    assert (answer.finish_reason, len(answer.text)) == ("length", 7)


def test_logprobs_are_the_models_own(random_engine: Engine) -> None:
    answer = ask(random_engine, Grammar.choice(["yes"]), logprobs=3)
    assert [entry.token_id for entry in answer.logprobs] == [ord(c) for c in "yes"]
    assert all(entry.logprob < -0.1 and len(entry.top) == 3 for entry in answer.logprobs)


def test_bias_and_penalties_work_among_the_allowed_tokens(random_engine: Engine) -> None:
    grammar = Grammar.choice(["yes", "no"])
    for token, said in ((ord("y"), "yes"), (ord("n"), "no")):
        assert {ask(random_engine, grammar, s, logit_bias={token: 100}).text for s in range(5)} == {said}
    for seed in range(5):
        answer = ask(random_engine, Grammar.regex("[a-e]{5}"), seed, presence_penalty=2.0, repetition_penalty=10.0)
        assert re.fullmatch("[a-e]{5}", answer.text)


# ---- among other requests


def test_requests_without_a_grammar_are_as_if_alone(
    tiny_engine: MakeEngine, reference: Callable[..., list[int]], letters: Tokenizer, tiny_model: LlamaForCausalLM
) -> None:
    prompts = ["abc", "say", "x" * 60, "say"]
    wanted = [reference(tiny_model, letters.render_text(p), 30, letters.stop_ids) for p in prompts]
    engine = tiny_engine(tiny_model, page_size=4, kv_cache_tokens=120)
    held = Sampling(max_tokens=60, temperature=1.0, seed=3, grammar=Grammar.regex("([a-f][0-9]){20}"))
    free = Sampling(max_tokens=30)
    answers = engine.generate(
        [*prompts, *["say"] * 4], [*[free] * len(prompts), *[held] * 4]
    )  # the pool is too small for all: some are put back and go on later
    assert engine._scheduler.num_preemptions > 0
    assert [list(a.token_ids) for a in answers[: len(prompts)]] == wanted
    assert len({a.text for a in answers[len(prompts) :]}) == 1
    assert re.fullmatch("([a-f][0-9]){20}", answers[-1].text)


def test_a_dead_end_ends_one_request_and_no_other(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, reference: Callable[..., list[int]],
    letters: Tokenizer, tiny_model: LlamaForCausalLM,
) -> None:  # fmt: skip
    wanted = reference(tiny_model, letters.render_text("abc"), 20, letters.stop_ids)
    engine, news = tiny_engine(tiny_model), dict[str, list[Chunk]]()
    engine.add(Request("held", (1, 50), Sampling(grammar=Grammar.regex("[a-z]{20}"))))
    engine.add(Request("free", tuple(letters.render_text("abc")), Sampling(max_tokens=20)))
    matcher = engine._live["held"].sampler._matcher
    assert matcher is not None
    true_mask, num_steps = matcher.allowed_V, 0

    def allowed_until_the_fifth() -> torch.Tensor:
        nonlocal num_steps
        num_steps += 1
        if num_steps > 4:
            raise DeadEnd("no token of this model can come next")
        return true_mask()

    monkeypatch.setattr(grammars.Matcher, "allowed_V", lambda self: allowed_until_the_fifth())
    while engine.has_work():
        for request_id, chunk in engine.step():
            news.setdefault(request_id, []).append(chunk)
    assert [t for c in news["free"] for t in c.token_ids] == wanted
    last = news["held"][-1]
    assert last.finish_reason == "error"
    assert "grammar" in (last.error or "")
    assert last.usage is not None
    assert last.usage.completion_tokens == 4
    assert engine.stats().kv_tokens_used == 0


def test_generate_raises_for_an_answer_that_met_a_dead_end(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    engine.prepare(Sampling(grammar=Grammar.regex("ab")))

    def fail(self: grammars.Matcher) -> torch.Tensor:
        raise DeadEnd("too much")

    monkeypatch.setattr(grammars.Matcher, "allowed_V", fail)
    with pytest.raises(EngineError, match="grammar wants: too much"):
        engine.generate("say", Sampling(grammar=Grammar.regex("ab")))


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar.regex("(("), "unclosed group"),
        (lambda: Grammar.regex("(?=a)b"), "look-around"),
        (lambda: Grammar.regex("[^\\s\\S]"), "cannot be met"),
        (lambda: Grammar.choice(["中"]), "cannot be met"),  # the tokens of the test are ASCII
        (lambda: Grammar.choice([]), "at least one"),
        (lambda: Grammar.schema({"type": "banana"}), "banana"),
        (lambda: Grammar.schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (lambda: Grammar.schema({"enum": []}), "Unsatisfiable"),
        (lambda: Grammar.schema("false"), "cannot be met"),
        (lambda: Grammar.schema({"not": {"type": "string"}}), "not"),
        (lambda: Grammar.schema({"$ref": "http://a.b/c"}), "http://a.b/c"),
        (lambda: Grammar.schema({"$ref": "#"}), "cannot be met"),
        (lambda: Grammar.schema("{"), "not JSON"),
        (lambda: Grammar.schema("[]"), "a schema is an object"),
        (lambda: Grammar.schema({"enum": ["x" * 70_000]}), "at most 65536"),
        (lambda: Grammar.schema({"multipleOf": 999983}), "multiple"),
        (lambda: Grammar.schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}), "multiple"),
        (lambda: Grammar("gbnf", "x"), "gbnf"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(
    random_engine: Engine, make: Callable[[], Grammar], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        random_engine.generate("say", Sampling(grammar=make()))
    assert caught.value.param == "grammar"
    assert len(str(caught.value)) < 500
    assert not random_engine.has_work()


@pytest.mark.parametrize("fields", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_a_grammar_alone_decides_where_the_answer_ends(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="contradict"):
        Sampling(grammar=Grammar.regex("a+"), **fields)


def deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep_schema(600),
        {"type": "array", "minItems": 10**9, "items": {}},
        {"type": "string", "minLength": 10**9},
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]},
        {"type": "string", "pattern": "((a{1,500}){1,500}){1,500}"},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 40} for i in range(1000)}},
    ],
    ids=["deep", "items", "long", "all of", "repeats", "properties"],
)
def test_a_hostile_schema_costs_a_refusal_or_a_bounded_answer(random_engine: Engine, schema: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError, EngineError):  # refused at once, or found out in a step
        assert ask(random_engine, Grammar.schema(schema), max_tokens=20).finish_reason in ("stop", "length")
    assert ask(random_engine, Grammar.choice(["ok"])).text == "ok"


def test_a_tokenizer_without_bytes_per_token_says_so(letters: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(letters), "token_bytes", lambda self, token: None)
    with pytest.raises(RequestError, match="tokens without a text"):
        Grammars(letters, 128).matcher(Grammar.regex("a"))


def test_only_the_latest_grammars_are_kept(letters: Tokenizer) -> None:
    kept = Grammars(letters, 128)
    for i in range(100):
        kept.matcher(Grammar.choice([f"c{i}"]))
    assert len(kept._kept) == 32
    first = kept._kept[Grammar.choice(["c99"])]
    kept.matcher(Grammar.choice(["c99"]))
    assert kept._kept[Grammar.choice(["c99"])] is first


# ---- a real vocabulary


def test_chinese_inside_json_from_a_real_model(smollm2: tuple[PreTrainedModel, Tokenizer]) -> None:
    schema = {
        "type": "object",
        "properties": {
            "城市": {"enum": ["北京", "上海市", "深圳"]},
            "说明": {"type": "string", "pattern": "^[一-龥]{2,6}$"},
        },
        "required": ["城市", "说明"],
        "additionalProperties": False,
    }
    model, tokenizer = smollm2
    engine = Engine(model, tokenizer=tokenizer, settings=EngineSettings(kv_cache_tokens=2048))
    held = [
        Sampling(max_tokens=120, temperature=t, seed=s, grammar=Grammar.schema(schema)) for t, s in ((0, 0), (1, 1))
    ]
    prompt = [{"role": "user", "content": "北京有什么？用 JSON 回答。"}]
    for answer in engine.generate([prompt, prompt], held):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)
        assert "\ufffd" not in answer.text
