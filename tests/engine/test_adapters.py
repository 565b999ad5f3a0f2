"""Adapters beside the base: a mixed batch equals PEFT's own output, and what cannot be served is refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from pingjia import chat
from pingjia.chat import Tokenizer
from pingjia.engine import Engine
from pingjia.engine.lora import AdaptedLinear
from pingjia.errors import ModelError, ModelNotFound
from pingjia.models import base_fingerprint
from pingjia.types import Completion, Request, Sampling

MakeEngine = Callable[..., Engine]
Make = Callable[..., LlamaForCausalLM]

CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj", "o_proj"], "exclude_modules": ["o_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"k_proj": 3},
    },
    "late layers": {
        "r": 2, "lora_alpha": 2, "target_modules": ["gate_proj", "q_proj"], "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    },
    "expression": {"r": 2, "lora_alpha": 4, "target_modules": r".*\.[02]\..*\.(up|o)_proj"},
}  # fmt: skip


def save_adapter(folder: Path, model: LlamaForCausalLM, seed: int = 0, **config: Any) -> Path:
    """A PEFT adapter with random matrices, as PEFT saves it; `model` is spent afterwards."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, make_tiny: Make) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(root / name.replace(" ", "_"), make_tiny(), seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


def prompts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(chr(rng.randrange(32, 120)) for _ in range(rng.randrange(20, 60))) for _ in range(count)]


def by_peft(make_tiny: Make, folder: Path | None, ids: list[int], reference: Callable[..., list[int]]) -> list[int]:
    model = make_tiny()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return reference(model, ids, 20, frozenset({2}))


def test_a_mixed_batch_equals_peft_for_every_adapter(
    tiny_engine: MakeEngine, make_tiny: Make, adapters: dict[str, Path], letters: Tokenizer,
    reference: Callable[..., list[int]],
) -> None:  # fmt: skip
    engine = tiny_engine(max_num_batched_tokens=50)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    asked = [(text, name) for text in prompts(3) for name in [None, *adapters]]
    requests = {str(i): (letters.render_text(text), name) for i, (text, name) in enumerate(asked)}
    for request_id, (ids, name) in requests.items():
        engine.add(Request(request_id, tuple(ids), Sampling(max_tokens=20), adapter=name))
    got: dict[str, list[int]] = {request_id: [] for request_id in requests}
    while engine.has_work():
        for request_id, chunk in engine.step():
            got[request_id] += chunk.token_ids
    wanted = {
        request_id: by_peft(make_tiny, adapters.get(name or ""), ids, reference)
        for request_id, (ids, name) in requests.items()
    }
    assert got == wanted
    assert len({tuple(got[str(i)]) for i in range(6)}) >= 5, "adapters must change answers, or nothing was tested"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_pefts_to_1e_4(
    make_tiny: Make, adapters: dict[str, Path], name: str, tiny_engine: MakeEngine
) -> None:
    ids = torch.tensor([[1, *range(40, 90)]])
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(make_tiny(), adapters[name])(input_ids=ids).logits
        base = make_tiny()(input_ids=ids).logits
    engine = tiny_engine()
    engine.load_adapter("a", adapters[name])
    captured: list[torch.Tensor] = []
    run = engine._runner.run
    engine._runner.run = lambda slices: captured.append(run(slices)) or captured[-1]  # type: ignore[method-assign,func-returns-value]
    engine.add(Request("r", tuple(ids[0].tolist()), Sampling(max_tokens=1), adapter="a"))
    engine.step()
    torch.testing.assert_close(captured[0], wanted[0, -1:], atol=1e-4, rtol=1e-4)
    assert (wanted - base).abs().max() > 0.1


# ---- names


def test_the_engines_own_adapter_is_used_unless_the_base_is_asked_for(
    make_tiny: Make, letters: Tokenizer, adapters: dict[str, Path]
) -> None:
    engine, sampling = Engine(make_tiny(), tokenizer=letters, adapter=adapters["all"]), Sampling(max_tokens=10)
    base, own = engine.models()
    assert (own.id, own.parent, own.root) == ("all", base.id, str(adapters["all"]))
    answers: list[Completion] = [
        engine.generate("hello there", sampling)[0],
        engine.generate("hello there", sampling, adapter="all")[0],
        engine.generate("hello there", sampling, adapter=None)[0],
        engine.generate("hello there", sampling, adapter=base.id)[0],
    ]
    texts = [a.text for a in answers]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    with pytest.raises(ModelNotFound, match=r"'nobody'.*served: llama, all"):
        engine.generate("hello", sampling, adapter="nobody")


def test_new_weights_under_an_old_name_never_meet_old_keys(
    tiny_engine: MakeEngine, adapters: dict[str, Path], make_tiny: Make
) -> None:
    engine, sampling, text = tiny_engine(), Sampling(max_tokens=10), "z" * 40
    engine.load_adapter("a", adapters["all"])
    (old,) = engine.generate(text, sampling, adapter="a")
    engine.load_adapter("a", adapters["all"])  # the same files: nothing happens
    assert engine.generate(text, sampling, adapter="a")[0].usage.cached_tokens == 40
    engine.load_adapter("a", adapters["attention"])
    (new,) = engine.generate(text, sampling, adapter="a")
    assert new.usage.cached_tokens == 0
    fresh = tiny_engine()
    fresh.load_adapter("b", adapters["attention"])
    assert new.token_ids == fresh.generate(text, sampling, adapter="b")[0].token_ids != old.token_ids


def finish(engine: Engine, most: int = 10_000) -> dict[str, list[int]]:
    """The tokens of each request in the next steps."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work() and (most := most - 1) >= 0:
        for request_id, chunk in engine.step():
            assert chunk.finish_reason != "error"
            tokens.setdefault(request_id, []).extend(chunk.token_ids)
    return tokens


def attached(engine: Engine) -> set[str]:
    modules = [m for m in engine._served.base.model.modules() if isinstance(m, AdaptedLinear)]
    return {key for module in modules for key in module.weights}


@pytest.mark.parametrize("how", ["replace", "unload"])
def test_requests_end_with_the_weights_they_began_with(
    tiny_engine: MakeEngine, adapters: dict[str, Path], how: str
) -> None:
    sampling, prompt = Sampling(max_tokens=20, ignore_eos=True), tuple(range(40, 70))
    alone = {}
    for kind in ("all", "attention"):
        engine = tiny_engine()
        engine.load_adapter("a", adapters[kind])
        engine.add(Request("r", prompt, sampling, adapter="a"))
        alone[kind] = finish(engine)["r"]
    assert alone["all"] != alone["attention"]

    engine = tiny_engine()
    engine.load_adapter("a", adapters["all"])
    for name in ("running", "waiting"):
        engine.add(Request(name, prompt, sampling, adapter="a"))
    early = finish(engine, most=5)
    engine.add(Request("late", prompt, sampling, adapter="a"))
    if how == "replace":
        engine.load_adapter("a", adapters["attention"])
        engine.add(Request("new", prompt, sampling, adapter="a"))
        assert len(attached(engine)) == 2
    else:
        engine.unload_adapter("a")
        with pytest.raises(ModelNotFound):
            engine.add(Request("new", prompt, sampling, adapter="a"))
        assert len(attached(engine)) == 1
    tokens = {name: early.get(name, []) + tokens for name, tokens in finish(engine).items()}
    assert tokens.pop("new", alone["attention"]) == alone["attention"]
    assert tokens == {name: alone["all"] for name in ("running", "waiting", "late")}
    assert len(attached(engine)) == (1 if how == "replace" else 0)


def test_a_cancelled_request_frees_what_only_it_used(tiny_engine: MakeEngine, adapters: dict[str, Path]) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", adapters["all"])
    engine.add(Request("r", (1, 70), Sampling(max_tokens=50, ignore_eos=True), adapter="a"))
    engine.step()
    engine.unload_adapter("a")
    assert len(attached(engine)) == 1
    engine.cancel("r")
    assert attached(engine) == set()
    assert [chunk.finish_reason for _, chunk in engine.step()] == ["cancelled"]


def test_names_come_and_go(tiny_engine: MakeEngine, adapters: dict[str, Path]) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", adapters["all"])
    engine.load_adapter("b", adapters["attention"])
    engine.load_adapter("b", adapters["all"])  # two names of the same files
    assert len(attached(engine)) == 1
    engine.unload_adapter("a")
    assert [card.id for card in engine.models()][1:] == ["b"]
    assert len(attached(engine)) == 1
    with pytest.raises(ModelNotFound):
        engine.unload_adapter("a")
    with pytest.raises(ModelError, match="base model"):
        engine.unload_adapter(engine.models()[0].id)
    with pytest.raises(ModelError, match="other than the base"):
        engine.load_adapter(engine.models()[0].id, adapters["all"])


def test_their_number_is_bounded(tiny_engine: MakeEngine, adapters: dict[str, Path]) -> None:
    engine = tiny_engine(max_loras=2)
    engine.load_adapter("a", adapters["all"])
    engine.load_adapter("b", adapters["attention"])
    with pytest.raises(ModelError, match=r"2 adapters are loaded, which is engine.max_loras; unload one"):
        engine.load_adapter("c", adapters["patterns"])
    for i, kind in enumerate(("patterns", "late layers", "expression")):
        engine.add(Request(f"r{i}", (1, 70), Sampling(max_tokens=50, ignore_eos=True), adapter="b"))
        if i < 2:
            engine.load_adapter("b", adapters[kind])
    with pytest.raises(ModelError, match="2 replaced adapters are still in use"):
        engine.load_adapter("b", adapters["expression"])
    finish(engine)
    engine.load_adapter("b", adapters["expression"])
    assert len(attached(engine)) == 2


def test_a_rank_over_the_limit_is_refused(tiny_engine: MakeEngine, adapters: dict[str, Path]) -> None:
    engine = tiny_engine(max_lora_rank=3)
    engine.load_adapter("a", adapters["all"])
    with pytest.raises(ModelError, match=r"rank 4 .*q_proj.* over the limit of 3; raise engine.max_lora_rank"):
        engine.load_adapter("b", adapters["attention"])
    assert engine.generate("abc", Sampling(max_tokens=3), adapter="a")


def test_without_adapters_the_network_is_as_it_was(tiny_engine: MakeEngine, adapters: dict[str, Path]) -> None:
    engine = tiny_engine()
    model = engine._served.base.model
    names = [name for name, _ in model.named_modules()]
    for name in ("a", "twin"):
        engine.load_adapter(name, adapters["attention"])
    engine.unload_adapter("a")
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == 6
    assert engine.generate("abc", Sampling(max_tokens=3), adapter="twin")
    engine.unload_adapter("twin")
    assert [name for name, _ in model.named_modules()] == names


# ---- refusals


def broken(source: Path, target: Path, config: dict[str, Any], change: Callable[[dict], None] | None = None) -> Path:
    """A copy of an adapter with some of its config and tensors changed."""
    target.mkdir()
    old = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(old | config))
    tensors = safetensors.torch.load_file(source / "adapter_model.safetensors")
    if change:
        change(tensors)
    safetensors.torch.save_file(tensors, target / "adapter_model.safetensors")
    return target


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if "layers.1." in n]:
        del tensors[name]


REFUSALS: list[tuple[str, dict[str, Any], Callable[[dict], None] | None, str]] = [
    ("another kind", {"peft_type": "IA3"}, None, "peft_type 'IA3'.*merge it first"),
    ("DoRA", {"use_dora": True}, None, "use_dora=True.*merge"),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}, None, r"modules_to_save=\['lm_head'\].*merge"),
    ("bias", {"bias": "all"}, None, "bias='all'.*merge"),
    ("transposed", {"fan_in_fan_out": True}, None, "fan_in_fan_out=True.*merge"),
    ("changed base", {"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'.*merge"),
    ("unknown field", {"brand_new_option": 3}, None, "brand_new_option=3.*merge"),
    ("all zero", {}, zero, "equals the base model"),
    ("half a pair", {}, drop(FIRST.format("B")), r"lora_B of model.layers.0.self_attn.q_proj is missing"),
    ("a layer short", {}, drop_layer, r"lora_A of model.layers.1.self_attn.q_proj is missing"),
    ("unknown tensor", {}, lambda t: t.update({"lm_head.bias": torch.ones(2)}), "unknown tensor lm_head.bias"),
    ("not targeted", {"target_modules": ["q_proj"]}, None, r"tensors for model.layers.0.self_attn.v_proj"),
    ("no such module", {"target_modules": ["q_proj", "v_proj", "W_pack"]}, None, "'W_pack' is no linear"),
    ("the head", {"target_modules": ["q_proj", "v_proj", "lm_head"]}, None, "'lm_head' is no linear"),
    ("another rank", {"r": 5}, None, r"q_proj has shape \(4, 48\), not \(5, 48\)"),
    ("another width", {}, lambda t: t.update({FIRST.format("A"): torch.ones(4, 47)}), r"\(4, 47\), not \(4, 48\)"),
    ("not a number", {}, lambda t: t[FIRST.format("A")].fill_(torch.nan), "not numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "change", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_cannot_be_served_is_refused(
    tiny_engine: MakeEngine, adapters: dict[str, Path], tmp_path: Path, config: dict, change: Any, message: str
) -> None:
    folder = broken(adapters["attention"], tmp_path / "broken", config, change)
    engine = tiny_engine()
    with pytest.raises(ModelError, match=message) as caught:
        engine.load_adapter("a", folder)
    assert "\n" not in str(caught.value)
    assert len(engine.models()) == 1
    assert not any(isinstance(m, AdaptedLinear) for m in engine._served.base.model.modules())


@pytest.mark.parametrize("kind", ["nothing", "no directory", "not json", "not a mapping", "not safetensors"])
def test_what_is_no_adapter_is_refused(
    tiny_engine: MakeEngine, adapters: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = broken(adapters["attention"], tmp_path / "a", {})
    if kind == "nothing":
        folder = tmp_path
    elif kind == "no directory":
        folder = tmp_path / "absent"
    elif kind == "not safetensors":
        (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    else:
        (folder / "adapter_config.json").write_text("{" if kind == "not json" else "[]")
    with pytest.raises(ModelError, match=r"not a PEFT adapter|not JSON|expected a mapping|cannot be read"):
        tiny_engine().load_adapter("a", folder)


def about(folder: Path, **content: Any) -> Path:
    (folder / "pingjia.json").write_text(json.dumps(content))
    return folder


def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(
    tiny_engine: MakeEngine, adapters: dict[str, Path], tmp_path: Path, make_tiny: Make
) -> None:
    folder = broken(adapters["attention"], tmp_path / "a", {})
    other = make_tiny()
    torch.nn.init.normal_(other.model.norm.weight)
    about(folder, base={"name": "other", "fingerprint": base_fingerprint(other)})
    with pytest.raises(ModelError, match="trained on another base model: other"):
        tiny_engine().load_adapter("a", folder)
    about(folder, base={"name": "tiny", "fingerprint": base_fingerprint(make_tiny())})
    engine = tiny_engine()
    engine.load_adapter("x", adapters["all"])  # wrapping linears must not change what the base's fingerprint is
    engine.load_adapter("a", folder)


def test_an_adapter_trained_with_another_chat_template_is_refused(
    tiny_engine: MakeEngine, adapters: dict[str, Path], tmp_path: Path, letters: Tokenizer
) -> None:
    folder = broken(adapters["attention"], tmp_path / "a", {})
    chats = [
        {"messages": [{"role": "user", "content": "abc"}], "ids": letters.render([{"role": "user", "content": "abc"}])}
    ]
    about(folder, chat={"golden": chats})
    tiny_engine().load_adapter("a", folder)
    chats[0]["ids"] = [7, *chats[0]["ids"]]
    about(folder, chat={"golden": chats})
    with pytest.raises(ModelError, match=r"another chat template.*golden chat 1"):
        tiny_engine().load_adapter("a", folder)
    about(folder, chat={"golden": [{"ids": []}]})
    with pytest.raises(ModelError, match="damaged"):
        tiny_engine().load_adapter("a", folder)


def test_golden_chats_of_the_real_tokenizer_pass_their_own_check() -> None:
    tokenizer = chat.load_tokenizer("smollm2")
    chat.check_golden(tokenizer, json.loads(json.dumps(chat.golden_chats(tokenizer))))
