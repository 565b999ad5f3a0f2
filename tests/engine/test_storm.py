"""All at once: drawn, greedy, guessing, biased, constrained and repeated answers, adapters that are replaced, cancels,
bad requests and a small pool. Whoever is not cancelled gets what it would get alone; the engine ends up empty."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from pingjia.engine import Engine
from pingjia.engine.lora import AdaptedLinear
from pingjia.errors import RequestError
from pingjia.types import Chunk, Grammar, Request, Sampling

MakeEngine = Callable[..., Engine]
KINDS = [
    Sampling(max_tokens=30),
    Sampling(max_tokens=45, ignore_eos=True),
    Sampling(max_tokens=25, temperature=1.0, top_p=0.9),
    Sampling(max_tokens=25, temperature=1.3, repetition_penalty=1.2, presence_penalty=0.3),
    Sampling(max_tokens=20, temperature=0.8, logit_bias={70: 3.0, 2: -100}, logprobs=2),
    Sampling(max_tokens=20, min_tokens=15, stop=("a", "Q")),
    Sampling(max_tokens=60, temperature=1.0, grammar=Grammar.regex("([a-f][0-9]){3,12}")),
    Sampling(
        max_tokens=40, temperature=1.0, grammar=Grammar.schema({"type": "array", "items": {"enum": [1, 22, "x"]}})
    ),
    Sampling(max_tokens=30, grammar=Grammar.choice(["yes", "no", "perhaps not"])),
]
BAD = [
    Sampling(grammar=Grammar.regex("(")),
    Sampling(grammar=Grammar.schema({"type": "integer", "minimum": 2, "maximum": 1})),
    Sampling(logit_bias={5000: 1.0}),
    Sampling(max_tokens=600),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., LlamaForCausalLM]) -> list[Path]:
    made = []
    for seed in range(2):
        adapted = get_peft_model(
            make_tiny(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        made.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        adapted.save_pretrained(made[-1])
    return made


def some_requests(rng: random.Random, count: int) -> list[Request]:
    """Several share a prompt, or its beginning; some answers go round in circles, which is easily guessed."""
    prompts = [tuple([1, *(rng.randrange(32, 120) for _ in range(rng.randrange(3, 70)))]) for _ in range(count // 4)]
    prompts += [prompts[0] + (40 + i,) for i in range(3)]
    circling = [Request(f"c{i}", (1, ord("a")), Sampling(max_tokens=110, ignore_eos=True)) for i in range(3)]
    return circling + [
        Request(f"r{i}", rng.choice(prompts), replace(rng.choice(KINDS), seed=i), rng.choice([None, None, "a"]))
        for i in range(count)
    ]


def run(engine: Engine, request: Request) -> list[Chunk]:
    engine.add(request)
    chunks = []
    while engine.has_work():
        chunks += [chunk for _, chunk in engine.step()]
    return chunks


def said(chunks: list[Chunk]) -> tuple[list[int], str, str | None]:
    return [t for c in chunks for t in c.token_ids], "".join(c.text for c in chunks), chunks[-1].finish_reason


@pytest.mark.parametrize("seed", range(3))
def test_everybody_gets_what_they_would_get_alone(tiny_engine: MakeEngine, folders: list[Path], seed: int) -> None:
    rng = random.Random(seed)
    requests = some_requests(rng, 48)
    alone: list[Engine] = [tiny_engine(prompt_lookup="off", prefix_caching=False) for _ in folders]
    for engine, folder in zip(alone, folders, strict=True):
        engine.load_adapter("a", folder)

    storm = tiny_engine(page_size=4, kv_cache_tokens=260, max_num_batched_tokens=24, max_num_seqs=6)
    storm.load_adapter("a", folders[0])
    version, versions, got = 0, dict[str, int](), dict[str, list[Chunk]]()
    todo = rng.sample(requests, len(requests))
    while todo or storm.has_work():
        if todo and rng.random() < 0.5:
            request = todo.pop()
            versions[request.id] = version
            storm.add(request)
        if rng.random() < 0.05:
            version = 1 - version
            storm.load_adapter("a", folders[version])
        if rng.random() < 0.1:
            with pytest.raises(RequestError):
                storm.add(Request("bad", (1, 50), rng.choice(BAD)))
        if rng.random() < 0.04 and storm._live:
            storm.cancel(rng.choice(sorted(storm._live)))
        for request_id, chunk in storm.step():
            got.setdefault(request_id, []).append(chunk)

    assert all(
        [bool(c.finish_reason) for c in chunks] == [False] * (len(chunks) - 1) + [True] for chunks in got.values()
    )
    assert set(got) == {request.id for request in requests}
    wrong = [
        request.id
        for request in requests
        if got[request.id][-1].finish_reason != "cancelled"
        and said(got[request.id]) != said(run(alone[versions[request.id]], request))
    ]
    assert wrong == []
    assert storm._scheduler.num_preemptions > 0
    assert storm.num_right_guesses > 0
    assert storm.stats().kv_tokens_used == 0
    assert (
        len({key for m in storm._served.base.model.modules() if isinstance(m, AdaptedLinear) for key in m.weights}) == 1
    )
