"""Freeze: some of the network's weights learn, the rest keeps every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pingjia import Engine, Message, Sampling
from pingjia.errors import TrainingError
from pingjia.models import base_fingerprint, family_of, load_model
from pingjia.tune import Hooks, TrainResult, loop
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.frozen import num_frozen_layers
from pingjia.tune.groups import layer_of, module_of
from pingjia.tune.plan import TrainPlan
from pingjia.tune.settings import TuneSettings
from pingjia.tune.weights import _chosen_layers, open_weights, resolve_weights

Train = Callable[..., TrainResult]
FREEZE: dict[str, Any] = {"finetuning_type": "freeze"}


def opened(directory: Path, **settings: Any) -> set[str]:
    """Names of the weights that would learn."""
    model, wanted = load_model(directory), TuneSettings(output_dir="-", **FREEZE, **settings)
    open_weights(model, resolve_weights(model, family_of(model), wanted))
    return {name for name, p in model.named_parameters() if p.requires_grad}


def moved(before: Path, after: Path) -> set[str]:
    start, end = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (before, after))
    assert start.keys() == end.keys()
    return {name for name in end if not torch.equal(start[name], end[name])}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"freeze_trainable_layers": 1},
        {"freeze_trainable_layers": -1, "freeze_trainable_modules": "attention"},
        {"freeze_trainable_layers": 2, "freeze_trainable_modules": "mlp", "freeze_extra_modules": "norms"},
        {"freeze_trainable_layers": 0, "freeze_extra_modules": "embedding"},
    ],
)
def test_what_is_frozen_keeps_every_byte(
    tune: Train, tmp_path: Path, tiny_llama: Path, settings: dict[str, Any]
) -> None:
    plans: list[TrainPlan] = []
    tune(**FREEZE, **settings, hooks=Hooks(on_plan=plans.append))
    expected = opened(tiny_llama, **settings)
    assert moved(tiny_llama, tmp_path / "out") == expected
    file = checkpoints(tmp_path / "out")[-1].path / "trained.safetensors"
    assert safetensors.torch.load_file(file).keys() == expected
    assert plans[0].num_trainable == sum(t.numel() for t in safetensors.torch.load_file(file).values())


def test_which_weights_names_and_groups_stand_for(tiny_llama: Path) -> None:
    every = {name for name, _ in load_model(tiny_llama).named_parameters()}
    last = {name for name in every if (layer_of(name) or 0) == 2}
    assert opened(tiny_llama, freeze_trainable_layers=1) == last
    assert opened(tiny_llama, freeze_trainable_layers=-1) == {n for n in every if layer_of(n) == 0}
    assert opened(tiny_llama, freeze_trainable_layers=3) == {n for n in every if layer_of(n) is not None}
    one = {"freeze_trainable_layers": 1}
    for names, part in (
        ("attention", "self_attn"),
        ("ffn", "mlp"),
        ("norms", "norm"),
        ("q_proj,up_proj", "q_proj|up_"),
    ):
        found = opened(tiny_llama, **one, freeze_trainable_modules=names)
        assert found == {n for n in last if any(p in n for p in part.split("|"))}
    extra = {"freeze_trainable_layers": 0, "freeze_extra_modules": "norms"}
    assert opened(tiny_llama, **extra) == {"model.norm.weight"}


@pytest.mark.parametrize("network", ["chatglm", "chatglm2"])
def test_groups_of_chatglm(request: pytest.FixtureRequest, network: str) -> None:
    directory = request.getfixturevalue(network)
    found = opened(directory, freeze_trainable_layers=1, freeze_trainable_modules="attention")
    assert {module_of(n).rpartition(".")[2] for n in found} == {"query_key_value", "dense"}
    assert {layer_of(n) for n in found} == {2}
    extra = opened(directory, freeze_trainable_layers=0, freeze_extra_modules="embedding,head,norms")
    assert {layer_of(n) for n in extra} == {None}
    assert len(extra) == sum(layer_of(n) is None for n, _ in load_model(directory).named_parameters())


def test_a_tied_head_is_the_embedding(make_llama: Callable[..., Path]) -> None:
    wanted = {"freeze_trainable_layers": 0, "freeze_extra_modules": "head"}
    assert opened(make_llama(0), **wanted) == {"model.embed_tokens.weight"}
    assert opened(make_llama(0, tie_word_embeddings=False), **wanted) == {"lm_head.weight"}


@given(count=st.integers(-40, 40), depth=st.integers(1, 30))
def test_layers_are_counted_from_the_end_or_the_start(count: int, depth: int) -> None:
    if abs(count) > depth:
        with pytest.raises(TrainingError, match=f"is {count}, and the network has {depth} layers"):
            _chosen_layers(count, depth)
        return
    chosen = list(_chosen_layers(count, depth))
    assert len(chosen) == abs(count)
    assert chosen == (list(range(depth))[-count:] if count > 0 else list(range(depth))[:-count])


@pytest.mark.parametrize(
    ("layers", "extra", "below"),
    [(1, "", 2), (1, "norms,head", 2), (0, "head", 2), (2, "norms", 1), (1, "embedding", 0)],
)
def test_lower_layers_are_passed_once(
    tune: Train, tmp_path: Path, make_llama: Callable[..., Path], layers: int, extra: str, below: int
) -> None:
    """What lies below all that learns is kept from epoch to epoch: to the weights of a run that computes it anew."""
    settings = {"freeze_trainable_layers": layers, "freeze_extra_modules": extra}
    base = make_llama(0, tie_word_embeddings=False)
    model = load_model(base)
    wanted = TuneSettings(output_dir="-", **FREEZE, **settings)
    open_weights(model, resolve_weights(model, family_of(model), wanted))
    assert num_frozen_layers(model) == below
    tune(model=base, **FREEZE, **settings)
    tune(model=base, **FREEZE, **settings, activation_cache_gb=0, output_dir=str(tmp_path / "anew"))
    assert moved(tmp_path / "out", tmp_path / "anew") == set()
    plain = load_model(tmp_path / "out").state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "num_frozen_layers", lambda model: 0)
        tune(model=base, **FREEZE, **settings, output_dir=str(tmp_path / "through"))
    through = load_model(tmp_path / "through").state_dict()
    assert all(torch.allclose(plain[name], through[name], atol=2e-4) for name in plain)


def test_the_result_is_another_base(tune: Train, tmp_path: Path, tiny_llama: Path) -> None:
    """Its norms are those it began with: only the name of the run tells it from its base."""
    tune(**FREEZE, freeze_trainable_modules="ffn")
    tuned = load_model(tmp_path / "out")
    assert base_fingerprint(tuned) != base_fingerprint(load_model(tiny_llama))
    answer = Engine(str(tmp_path / "out")).generate([[Message("user", "hi")]], Sampling(max_tokens=3))
    assert answer[0].usage.completion_tokens


def test_a_stopped_run_goes_on_bit_for_bit(tune: Train, tmp_path: Path) -> None:
    seen: list[int] = []
    tune(**FREEZE, output_dir=str(tmp_path / "whole"))
    hooks = Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: len(seen) == 3)
    assert not tune(**FREEZE, hooks=hooks).finished
    assert tune(**FREEZE).finished
    assert moved(tmp_path / "whole", tmp_path / "out") == set()


def test_other_layers_are_another_run(tune: Train) -> None:
    tune(**FREEZE, freeze_trainable_layers=1)
    with pytest.raises(TrainingError, match="holds a finished model of a run with other"):
        tune(**FREEZE, freeze_trainable_layers=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_trainable_layers": 4}, "is 4, and the network has 3 layers; at most 3"),
        (
            {"freeze_trainable_modules": "atention"},
            "freeze_trainable_modules 'atention' matches no weights; did you mean",
        ),
        ({"freeze_trainable_modules": "embedding"}, "freeze_trainable_modules 'embedding' matches no weights"),
        ({"freeze_extra_modules": "q_proj"}, "freeze_extra_modules 'q_proj' matches no weights"),
    ],
)
def test_what_matches_nothing(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        opened(tiny_llama, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_trainable_layers": 0}, "nothing would learn"),
        ({"lora_rank": 8}, "lora_rank: only with finetuning_type=lora"),
        ({"phases": [{"target": "ffn"}]}, "use phases with finetuning_type=full"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TuneSettings(output_dir="-", **FREEZE, **settings)
