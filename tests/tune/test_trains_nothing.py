"""Seven faults by which a run trains nothing and looks fine. Each is planted in a real run, and each is stopped within
five updates, with its cause named and nothing left that could be taken for a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint as recompute

from pingjia import data
from pingjia.errors import DataError, PingjiaError, TrainingError
from pingjia.tune import Hooks, checkpoint, loop, run, step
from pingjia.tune.distributed import Alone
from pingjia.tune.frozen import layers_of

MAX_UPDATES = 5
FULL = {"finetuning_type": "full"}
Stopped = Callable[..., str]


@pytest.fixture
def stopped(tune: Callable[..., Any], tmp_path: Path) -> Stopped:
    """stopped(**TuneSettings): the message of a run that must be refused by MAX_UPDATES and leave no result."""

    def train(kind: type[PingjiaError] = TrainingError, **changed: Any) -> str:
        updates: list[int] = []
        with pytest.raises(kind) as caught:
            tune(**{"save_steps": 100, **changed}, hooks=Hooks(on_step=lambda log: updates.append(log.step)))
        assert len(updates) <= MAX_UPDATES
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert not left & {"pingjia.json", "adapter_model.safetensors", "model.safetensors"}
        assert not any(name.startswith((".adapter", ".model", ".checkpoint")) for name in left)
        return str(caught.value)

    return train


# ---- 1 every label is masked


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_label_is_masked(stopped: Stopped, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As where a template does not mark the answers. Also where that is so of a single row."""
    real = data.encode_examples

    def mask(rows: slice) -> None:
        def encode(*args: Any) -> Any:
            encoded, problems = real(*args)
            for number in range(len(encoded))[rows]:
                encoded[number] = replace(encoded[number], learn=tuple(False for _ in encoded[number].ids))
            return encoded, problems

        monkeypatch.setattr(data, "encode_examples", encode)

    mask(slice(None))
    assert "7 of 7 rows teach nothing" in (said := stopped(finetuning_type=kind))
    assert "rows.jsonl:1" in said
    assert "masked" in said
    mask(slice(2, 3))
    assert "1 of 7 rows teach nothing (the first:" in (said := stopped(finetuning_type=kind))
    assert "rows.jsonl:3" in said


def test_no_answer_fits(stopped: Stopped) -> None:
    assert "cutoff_len 8" in stopped(DataError, data={"cutoff_len": 8})


# ---- 2 the learning rate never leaves 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_rate_is_zero(stopped: Stopped, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert "the learning rate of every update was 0" in stopped(finetuning_type=kind, learning_rate=0.0)
    monkeypatch.setattr(loop, "rate_factor", lambda *args, **kwargs: 0.0)  # a warm-up that never ends
    assert "a schedule that does not leave 0" in stopped(finetuning_type=kind)


# ---- 3 nothing is adapted, or what is adapted is not used


def test_the_target_matches_nothing(stopped: Stopped) -> None:
    assert "'query_key_value' matches no linear" in stopped(lora_target="query_key_value")
    assert "'query_key_value' matches no weights" in stopped(**FULL, phases=[{"target": "query_key_value"}])


def test_what_is_adapted_is_not_used(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter sits on a projection whose result the network does not look at."""
    real = run.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        mlp = model.model.layers[1].mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))  # up_proj is left out
        return model

    monkeypatch.setattr(run, "load_model", load)
    for kind in ("lora", "full"):
        said = stopped(finetuning_type=kind)
        assert "model.layers.1.mlp.up_proj" in said
        assert "no gradient reaches it: the network does not use it" in said


# ---- 4 what learns is not what the optimizer moves, or is switched off


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_optimizer_holds_other_parameters(stopped: Stopped, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = loop.optimizer_groups

    def forget_some(*args: Any) -> Any:
        made = real(*args)
        made[0]["params"] = made[0]["params"][1:]
        return made

    monkeypatch.setattr(loop, "optimizer_groups", forget_some)
    assert "1 are in none of its groups, the first: " in stopped(finetuning_type=kind)


def test_the_optimizer_holds_copies(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a network is moved or wrapped after its optimizer was made."""
    real = loop.optimizer_groups

    def copied(*args: Any) -> Any:
        return [{**g, "params": [torch.nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in real(*args)]

    monkeypatch.setattr(loop, "optimizer_groups", copied)
    assert "42 are in none of its groups" in stopped()


def test_the_adapter_is_switched_off(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._Phase._build_optimizer

    def switch_off(phase: Any) -> None:
        real(phase)
        for module in phase.run.model.modules():
            if hasattr(module, "lora_A"):
                module._disable_adapters = True

    monkeypatch.setattr(loop._Phase, "_build_optimizer", switch_off)
    assert "the loss depends on nothing that learns" in (said := stopped())
    assert "switched off" in said


def test_the_adapter_is_scaled_by_zero(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._Phase._build_optimizer

    def scale(phase: Any) -> None:
        real(phase)
        for module in phase.run.model.modules():
            if hasattr(module, "lora_A"):
                module.scaling = dict.fromkeys(module.scaling, 0.0)

    monkeypatch.setattr(loop._Phase, "_build_optimizer", scale)
    assert "every gradient is exactly 0" in (said := stopped())
    assert "scaled by 0" in said


# ---- 5 the graph is cut on the way to what learns


def test_checkpointing_without_gradients_of_its_input(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old kind of checkpointing over a frozen embedding: no gradient comes out of any layer."""

    def reentrant(model: Any) -> None:
        for layer in layers_of(model):
            plain = layer.forward
            layer.forward = lambda states, plain=plain, **rest: recompute(
                partial(plain, **rest), states, use_reentrant=True
            )

    monkeypatch.setattr(run, "checkpoint_activations", reentrant)
    said = stopped(gradient_checkpointing=True)
    assert "the loss depends on nothing that learns" in said
    assert "use_reentrant=True" in said


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_layer_detaches(stopped: Stopped, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What lies below it gets no gradient, what lies above does: the loss falls and half of the run is for nothing."""
    real = run.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        return model

    monkeypatch.setattr(run, "load_model", load)
    said = stopped(finetuning_type=kind)
    assert "no gradient reaches it" in said
    assert "detaches" in said
    assert "model.layers.0." in said


# ---- 6 gradients are there and do nothing


def test_gradients_are_no_numbers(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Alone.backward

    def poisoned(self: Alone, loss: torch.Tensor) -> None:
        real(self, loss * float("nan"))

    monkeypatch.setattr(Alone, "backward", poisoned)
    assert "training has diverged" in stopped(memory="off")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_are_clipped_to_nothing(stopped: Stopped, kind: str) -> None:
    said = stopped(finetuning_type=kind, max_grad_norm=1e-30)
    assert "scaled down to max_grad_norm 1e-30" in said
    assert "raise max_grad_norm" in said


def test_every_step_is_skipped(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scaler of half-precision losses does after an overflow; here after every update."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    said = stopped()
    assert "42 of 42 adapter tensors have not moved" in said


# ---- 7 what is saved is what the run began with


def test_the_adapter_that_is_saved_is_the_one_it_began_with(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is zero at the start: such a file loads everywhere, and is the base model."""
    real = checkpoint.get_peft_model_state_dict

    def at_start(model: Any, **kwargs: Any) -> Any:
        return {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in real(model, **kwargs).items()}

    monkeypatch.setattr(checkpoint, "get_peft_model_state_dict", at_start)
    assert "lora_B matrices are zero: this adapter equals the base model" in stopped(save_steps=2)


def test_the_model_that_is_saved_is_the_base(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    """Trained, and then the base is written. (The run is four updates long: a model is written once, at the end.)"""
    from pingjia.models import load_model
    from pingjia.tune import directory

    monkeypatch.setattr(directory, "save_network", lambda folder, model: load_model(tiny_llama).save_pretrained(folder))
    assert "the saved model is not the trained one" in stopped(**FULL, max_steps=4)


def test_the_loss_reads_what_was_computed_before(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the first update, over and over: a loss that looks like one, from weights that are not looked at."""
    kept: list[torch.Tensor] = []
    real = step.summed_loss

    def cached(model: Any, batch: Any, **kwargs: Any) -> torch.Tensor:
        if not kept:
            kept.append(real(model, batch, **kwargs).detach())
        return kept[0]

    monkeypatch.setattr(step, "summed_loss", cached)
    assert "the loss depends on nothing that learns" in stopped()


def test_a_sound_run_is_not_stopped(tune: Callable[..., Any]) -> None:
    """Else the tests above could not fail."""
    assert tune(save_steps=100).finished
