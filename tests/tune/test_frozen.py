"""Rows that pass the frozen lower layers once are what they would be if they passed them every time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune import Hooks
from pingjia.tune.frozen import FrozenLayers, layers_of, num_frozen_layers
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

CPU = torch.device("cpu")


@pytest.fixture
def adapted(tiny_llama: Path) -> Callable[..., Any]:
    def make(**changed: Any) -> Any:
        given = {"lora_target": "q_proj,down_proj", "lora_layers": "3-3", "lora_dropout": 0.0, **changed}
        settings = TuneSettings(output_dir="-", lora_rank=4, **given)
        model = load_model(tiny_llama)
        result = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        generator = torch.Generator().manual_seed(11)
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        use_packed_attention(model)
        return result.train()

    return make


def rows_of(lengths: list[int]) -> list[Encoded]:
    generator = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(49152, (n,), generator=generator).tolist()) for n in lengths]
    return [Encoded(row, tuple(i > 1 for i in range(len(row)))) for row in ids]


def test_which_layers_are_below(adapted: Callable[..., Any]) -> None:
    assert num_frozen_layers(adapted()) == 2
    assert num_frozen_layers(adapted(lora_layers="2-3")) == 1
    assert num_frozen_layers(adapted(lora_layers=None)) == 0
    assert num_frozen_layers(adapted(lora_target="q_proj,embed_tokens")) == 0, "the embedding lies below everything"


def test_dropout_below_forbids_it(adapted: Callable[..., Any]) -> None:
    """An adapter that is closed in this phase still drops out; above the first that learns it may."""
    model = adapted(lora_layers=None, lora_dropout=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.2." in name and "lora_" in name)
    assert num_frozen_layers(model) == 0
    assert num_frozen_layers(adapted(lora_dropout=0.1)) == 2
    model = adapted()
    model.config.attention_dropout = 0.1
    assert num_frozen_layers(model) == 0


@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_batch_that_has_passed_equals_one_that_has_not(adapted: Callable[..., Any], budget: int) -> None:
    rows, numbers = rows_of([5, 30, 17, 2]), [7, 3, 0, 5]
    plain, passed = adapted(), adapted()
    losses = []
    for model in (plain, passed):
        batch = build_batch(rows, family_of(model), model.config, CPU)
        if model is passed:
            below = FrozenLayers(model, family_of(model), num_frozen_layers(model), budget)
            batch = dataclasses.replace(batch, entering=below.entering(numbers, rows))
        loss = summed_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (name, left), right in zip(plain.named_parameters(), passed.parameters(), strict=True):
        if left.requires_grad:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_kept_or_computed_anew_it_is_the_same_bit_for_bit(adapted: Callable[..., Any]) -> None:
    rows = rows_of([5, 30, 17, 2])
    model = adapted()
    keeping, forgetting = (FrozenLayers(model, family_of(model), 2, budget) for budget in (10**9, 0))
    first = keeping.entering([0, 1, 2, 3], rows).states_1TH
    assert keeping.kept_bytes == first.nbytes
    assert forgetting.kept_bytes == 0
    reordered = keeping.entering([2, 0], [rows[2], rows[0]]).states_1TH
    assert torch.equal(reordered, forgetting.entering([2, 0], [rows[2], rows[0]]).states_1TH)
    assert torch.equal(first, forgetting.entering([0, 1, 2, 3], rows).states_1TH)


def test_a_row_passes_the_lower_layers_once(adapted: Callable[..., Any]) -> None:
    rows = rows_of([5, 30, 17])
    model = adapted()
    passes: list[int] = []
    layers_of(model)[0].register_forward_hook(lambda module, args, output: passes.append(args[0].shape[1]))
    below = FrozenLayers(model, family_of(model), 2, 17 * 64 * 4 + 5 * 64 * 4)
    for _ in range(3):
        below.entering([0, 1, 2], rows)
    assert passes == [5, 30, 17, 30, 30], "what is over the budget passes again, the rest does not"


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_is_the_same_with_and_without_room(tune: Callable[..., Any], tmp_path: Path) -> None:
    """And also when it was stopped: what was kept is lost then."""
    layers = {"lora_layers": "2-3"}
    tune(output_dir=str(tmp_path / "kept"), **layers)
    tune(output_dir=str(tmp_path / "anew"), activation_cache_gb=0, **layers)
    seen: list[int] = []
    hooks = Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= 3)
    assert not tune(output_dir=str(tmp_path / "stopped"), hooks=hooks, **layers).finished
    assert tune(output_dir=str(tmp_path / "stopped"), **layers).finished
    assert digest(tmp_path / "kept") == digest(tmp_path / "anew") == digest(tmp_path / "stopped")


def test_a_run_equals_one_that_passes_every_layer(
    tune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = tune(output_dir=str(tmp_path / "a"), lora_layers="2-3")
    monkeypatch.setattr("pingjia.tune.loop.num_frozen_layers", lambda model: 0)
    plain = tune(output_dir=str(tmp_path / "b"), lora_layers="2-3")
    assert passed.last_loss == pytest.approx(plain.last_loss, rel=1e-5)
