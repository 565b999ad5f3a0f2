"""Adapters that bring rows of the embedding and the head: in a mixed batch everyone sees his own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from pingjia.chat import Tokenizer
from pingjia.engine import Engine
from pingjia.engine.lora import AdaptedLinear
from pingjia.engine.token_rows import AdaptedTable
from pingjia.errors import ModelError
from pingjia.types import Request, Sampling

MakeEngine = Callable[..., Engine]
Make = Callable[..., LlamaForCausalLM]
NEW = [60, 61, 70, 101, 127]
OTHERS = [61, 62, 99]
EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
CONFIGS: dict[str, Any] = {
    "both": {"embed_tokens": NEW, "lm_head": NEW},
    "unlike": {"model.embed_tokens": OTHERS, "lm_head": NEW[:2]},
    "embedding": NEW,
    "lora only": None,
}


def save_adapter(folder: Path, model: LlamaForCausalLM, seed: int, tokens: Any) -> Path:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], trainable_token_indices=tokens
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def make(request: pytest.FixtureRequest, make_tiny: Make) -> Make:
    return lambda: make_tiny(tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def adapters(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, is_tied = tmp_path_factory.mktemp("adapters"), make().config.tie_word_embeddings
    wanted = {n: t for n, t in CONFIGS.items() if not (is_tied and n == "unlike")}
    return {n: save_adapter(root / n.replace(" ", "_"), make(), seed, t) for seed, (n, t) in enumerate(wanted.items())}


def requests(engine: Engine, adapters: dict[str, Path], letters: Tokenizer) -> dict[str, tuple[list[int], str | None]]:
    texts = ["a<=Fe e<=}", "plain", "<" * 30 + "e=" * 20, "}" * 3]
    asked = [(letters.render_text(text), name) for text in texts for name in [None, *adapters]]
    return {str(i): both for i, both in enumerate(asked)}


def test_a_mixed_batch_equals_peft_for_every_adapter(
    make: Make,
    adapters: dict[str, Path],
    tiny_engine: MakeEngine,
    letters: Tokenizer,
    reference: Callable[..., list[int]],
) -> None:
    engine = tiny_engine(make(), max_num_batched_tokens=50)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    asked = requests(engine, adapters, letters)
    for request_id, (ids, adapter) in asked.items():
        engine.add(Request(request_id, tuple(ids), Sampling(max_tokens=20), adapter=adapter))
    got: dict[str, list[int]] = {request_id: [] for request_id in asked}
    while engine.has_work():
        for request_id, chunk in engine.step():
            got[request_id] += chunk.token_ids
    merged = {None: make()} | {
        n: PeftModel.from_pretrained(make(), folder).merge_and_unload() for n, folder in adapters.items()
    }
    wanted = {i: reference(merged[name], ids, 20, frozenset({2})) for i, (ids, name) in asked.items()}
    assert got == wanted
    assert len({tuple(got[str(i)]) for i in range(len(adapters) + 1)}) == len(adapters) + 1, "or nothing was tested"
    assert {token for tokens in got.values() for token in tokens} & set(NEW)


def test_logits_equal_pefts(make: Make, adapters: dict[str, Path], tiny_engine: MakeEngine) -> None:
    ids = [1, 60, 45, 61, 101, 62, 50]
    for folder in adapters.values():
        with torch.no_grad():
            wanted = PeftModel.from_pretrained(make(), folder).eval()(input_ids=torch.tensor([ids])).logits
        engine = tiny_engine(make())
        engine.load_adapter("a", folder)
        captured: list[torch.Tensor] = []
        run = engine._runner.run
        engine._runner.run = lambda slices, run=run, to=captured: to.append(run(slices)) or to[-1]  # type: ignore[method-assign,misc]
        engine.add(Request("r", tuple(ids), Sampling(max_tokens=1), adapter="a"))
        engine.step()
        torch.testing.assert_close(captured[0], wanted[0, -1:], atol=1e-4, rtol=1e-4)


def test_the_bases_tables_and_modules_are_left_as_they_were(
    make: Make, adapters: dict[str, Path], tiny_engine: MakeEngine, letters: Tokenizer
) -> None:
    engine = tiny_engine(make())
    model, sampling = engine._served.base.model, Sampling(max_tokens=10)
    modules = [name for name, _ in model.named_modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    (before,) = engine.generate("a<=F", sampling)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    assert sum(isinstance(m, AdaptedTable) for m in model.modules()) == 2
    (own,) = engine.generate("a<=F", sampling, adapter="both")
    assert engine.generate("a<=F", sampling)[0].token_ids == before.token_ids != own.token_ids
    for name in adapters:
        engine.unload_adapter(name)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(isinstance(m, AdaptedTable | AdaptedLinear) for m in model.modules())


def test_adapters_may_come_while_others_are_served(
    make: Make, adapters: dict[str, Path], tiny_engine: MakeEngine
) -> None:
    """Reading an adapter looks at the network's tables, which then are wrapped already."""
    first, second = tiny_engine(make()), tiny_engine(make())
    for engine, names in ((first, ["both", "embedding"]), (second, ["embedding", "both"])):
        for name in names:
            engine.load_adapter(name, adapters[name])
    for name in ("both", "embedding"):
        one, two = (e.generate("<=Fe", Sampling(max_tokens=8), adapter=name)[0].token_ids for e in (first, second))
        assert one == two


# ---- refusals


Change = Callable[[dict[str, torch.Tensor]], object]
REFUSALS: list[tuple[str, dict[str, Any], Change | None, str]] = [
    ("rows missing", {}, lambda t: t.pop(EMBEDDING), "token rows of .* are missing in its file or in its config"),
    ("config missing", {"trainable_token_indices": None}, None, "are missing in its file or in its config"),
    ("another count", {"trainable_token_indices": NEW[:3]}, None, r"have shape \(5, 48\), not \(3, 48\)"),
    ("another width", {}, lambda t: t.update({EMBEDDING: torch.ones(5, 47)}), r"shape \(5, 47\), not \(5, 48\)"),
    ("beyond", {"trainable_token_indices": [60, 61, 70, 101, 128]}, None, "different ids from 0 to 127: another base"),
    ("negative", {"trainable_token_indices": [60, 61, 70, 101, -1]}, None, "different ids from 0 to 127"),
    ("twice", {"trainable_token_indices": [60, 61, 70, 101, 60]}, None, "different ids from 0 to 127"),
    ("elsewhere", {"trainable_token_indices": {"wte": NEW}}, None, "'wte', which is neither the embedding nor"),
    ("not a number", {}, lambda t: t[EMBEDDING].fill_(torch.nan), "not numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "change", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_does_not_fit_together_is_refused(
    make: Make,
    adapters: dict[str, Path],
    tiny_engine: MakeEngine,
    tmp_path: Path,
    config: Any,
    change: Any,
    message: str,
) -> None:
    folder = Path(shutil.copytree(adapters["embedding"], tmp_path / "broken"))
    old = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(old | config))
    if change:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    engine = tiny_engine(make())
    with pytest.raises(ModelError, match=message) as caught:
        engine.load_adapter("a", folder)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(m, AdaptedTable | AdaptedLinear) for m in engine._served.base.model.modules())
