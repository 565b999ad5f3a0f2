"""The memory plan: its arithmetic equals what autograd really keeps, and it moves the right way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.tune import Hooks
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.memory import Adapters, Held, NetworkShape, Work, plan_memory
from pingjia.tune.relief import checkpoint_activations
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

ROWS = [Encoded(tuple(range(5, 5 + n)), tuple(i > n // 2 for i in range(n))) for n in (30, 21, 40)]
HELD = Held(weights=0, adapters=0, num_trainable=0, process=0)


def kept_by_autograd(model: Any) -> int:
    """Bytes of different storages that the forward pass keeps, without weights and what belongs to the logits."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = build_batch(ROWS, family_of(model.get_base_model()), model.config, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = summed_loss(model, batch)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("target", ["all", "q_proj,v_proj"])
def test_activations_are_what_autograd_keeps(
    tiny_llama: Path, target: str, dropout: float, checkpointing: bool
) -> None:
    settings = TuneSettings(output_dir="-", lora_rank=4, lora_dropout=dropout, lora_target=target)
    model = load_model(tiny_llama)
    targets = resolve_targets(model, family_of(model), settings)
    adapted = add_adapter(model, targets, settings).train()
    use_packed_attention(model)
    if checkpointing:
        checkpoint_activations(adapted)
    inputs = {name: model.get_submodule(name).in_features for name in targets.modules}
    adapters = Adapters(inputs, dict.fromkeys(inputs, 4), dropout > 0, 4)
    work = Work(tuple(len(r.ids) for r in ROWS), sum(r.num_learnt for r in ROWS), 3, 4, checkpointing)
    plan = plan_memory(NetworkShape.of(model.config), adapters, work, HELD)
    assert plan.activations == pytest.approx(kept_by_autograd(adapted), rel=0.12)


def shape() -> NetworkShape:
    return NetworkShape(num_layers=4, hidden=8, vocab=1000, norms=16, attention=24, ffn=48, widest=16)


def planned(**changed: Any) -> Any:
    work = Work((10, 20), 12, 4, 4, False)
    return plan_memory(shape(), Adapters({"a.q_proj": 8}, {"a.q_proj": 2}, False, 4), work, HELD, **changed)


def test_the_parts_add_up() -> None:
    plan = planned(kept_states=7)
    assert plan.num_tokens == 30
    parts = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    assert plan.total == sum(parts.values()) - 30
    assert plan.kept_states == 7
    assert plan.activations == 30 * (4 * 4 * (16 + 24 + 48) + 4 * 8 + 4 * 2 + 4 * 8)


def test_shared_inputs_count_once_and_dropout_makes_copies() -> None:
    inputs = {"l.self_attn.q_proj": 8, "l.self_attn.v_proj": 8, "l.self_attn.o_proj": 8}
    ranks = dict.fromkeys(inputs, 2)
    assert Adapters(inputs, ranks, False, 4).bytes_per_token() == 4 * (8 + 8) + 4 * 6
    assert Adapters(inputs, ranks, True, 4).bytes_per_token() == 3 * 8 * 8 + 4 * 6
    assert Adapters(inputs, ranks, True, 1).bytes_per_token() == 3 * 8 * 5 + 4 * 6


def test_logits_have_a_bound() -> None:
    work = Work((10_000,), 9_000, 4, 4, False)
    large = plan_memory(dataclasses.replace(shape(), vocab=50_000), Adapters({}, {}, False, 4), work, HELD)
    assert large.logits == 64 * 2**20 + 4 * 8 * 9_000


def test_shapes_of_chatglm() -> None:
    one = NetworkShape.of(ChatGLMConfig(hidden_size=64, inner_hidden_size=256, num_layers=2, num_attention_heads=4))
    assert (one.norms, one.attention, one.ffn, one.sees_prompt_both_ways) == (128, 384, 256, True)
    two = NetworkShape.of(ChatGLM2Config())
    assert (two.hidden, two.ffn) == (4096, 3 * 13696)
    assert two.attention == 2 * 4096 + 256 + (4096 + 512)


def test_a_run_hands_over_its_plan(tune: Callable[..., Any], tmp_path: Path) -> None:
    plans: list[Any] = []
    result = tune(hooks=Hooks(on_plan=plans.append), max_steps=2)
    assert 0.5 < plans[0].memory.total / result.peak_bytes < 2
    tune(hooks=Hooks(on_plan=plans.append), memory="off", max_steps=2, output_dir=str(tmp_path / "off"))
    assert plans[1].memory is None
