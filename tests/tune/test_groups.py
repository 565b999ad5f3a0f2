"""Layer-wise rates are a contract: every trainable parameter in exactly one group, or no run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model
from pingjia.tune import Hooks
from pingjia.tune.groups import RateGroup, Rates, group_parameters
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.plan import RateRow, TrainPlan
from pingjia.tune.ranges import describe, parse_layers
from pingjia.tune.settings import TuneSettings

Named = list[tuple[str, torch.nn.Parameter]]


def adapter_parameters(num_layers: int, *, embedding: bool = False) -> Named:
    names = [
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
        for layer in range(num_layers)
        for module in ("q_proj", "v_proj")
        for matrix in "AB"
    ]
    if embedding:
        names.append("base_model.model.model.embed_tokens.lora_embedding_A.default")
    return [(name, torch.nn.Parameter(torch.zeros(2, 3))) for name in names]


def names_of(groups: list[RateGroup]) -> list[str]:
    return [name for group in groups for name in group.names]


def test_the_plans_own_rates() -> None:
    """Layers 1-12 at 1e-5, 13-28 at 1e-4, as ChatGLM-6B has them."""
    groups = group_parameters(adapter_parameters(28), Rates(1.0, {"1-12": 1e-5, "13-28": 1e-4}), 28)
    assert [(g.label, g.rate, g.count, g.modules) for g in groups] == [
        ("layers 1-12", 1e-5, 12 * 4 * 6, ("q_proj", "v_proj")),
        ("layers 13-28", 1e-4, 16 * 4 * 6, ("q_proj", "v_proj")),
    ]


@given(st.integers(1, 64), st.floats(0.05, 0.95))
def test_two_shares_share_out_every_network(num_layers: int, at: float) -> None:
    text = f"{at:.6f}"
    parts = []
    for share in (f"0-{text}", f"{text}-1.0"):
        try:
            parts += parse_layers(share, num_layers) or ()
        except TrainingError:
            continue  # a network of one layer has only one of the two
    assert sorted(parts) == list(range(num_layers))


@given(st.integers(1, 40), st.lists(st.integers(0, 39), min_size=1, unique=True))
def test_layers_are_described_as_they_are_read(num_layers: int, wanted: list[int]) -> None:
    layers = tuple(sorted({i % num_layers for i in wanted}))
    assert parse_layers(describe(layers), num_layers) == layers


@given(
    st.integers(2, 30),
    st.lists(st.integers(1, 29), max_size=4, unique=True),
    st.sampled_from([1.0, 16.0]),
    st.booleans(),
)
def test_every_parameter_is_in_exactly_one_group(
    num_layers: int, cuts: list[int], b_ratio: float, embedding: bool
) -> None:
    borders = [0, *sorted({c for c in cuts if c < num_layers}), num_layers]
    ranges = {f"{a + 1}-{b}": 10.0**-i for i, (a, b) in enumerate(pairwise(borders))}
    named = adapter_parameters(num_layers, embedding=embedding)
    groups = group_parameters(named, Rates(1.0, ranges | ({"other": 0.5} if embedding else {}), b_ratio), num_layers)
    assert sorted(names_of(groups)) == sorted(name for name, _ in named)
    assert len({id(p) for g in groups for p in g.parameters}) == len(named)


def test_a_layer_without_a_rate_stops_the_run() -> None:
    with pytest.raises(TrainingError, match=r"no rate to .*layers\.3\.self_attn\.q_proj \(layer 4\); add '4' to it"):
        group_parameters(adapter_parameters(6), Rates(1.0, {"1-3": 1e-5, "5-6": 1e-4}), 6)


def test_what_is_in_no_layer_needs_a_rate_of_its_own() -> None:
    named = adapter_parameters(2, embedding=True)
    with pytest.raises(TrainingError, match=r"embed_tokens \(no layer\); add 'other' to it"):
        group_parameters(named, Rates(1.0, {"1-2": 1e-5}), 2)
    groups = group_parameters(named, Rates(1.0, {"1-2": 1e-5, "other": 3e-5}), 2)
    assert [(g.label, g.rate) for g in groups] == [("layers 1-2", 1e-5), ("other", 3e-5)]


@pytest.mark.parametrize("ranges", [{"1-4": 1e-5, "4-6": 1e-4}, {"0-0.7": 1e-5, "4-6": 1e-4}])
def test_a_layer_with_two_rates_stops_the_run(ranges: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=r"layer 4 is in '.*' and in '4-6'; name it once"):
        group_parameters(adapter_parameters(6), Rates(1.0, ranges), 6)


def test_frozen_parameters_are_in_no_group() -> None:
    named = adapter_parameters(2)
    named[0][1].requires_grad_(False)
    assert names_of(group_parameters(named, Rates(1e-3), 2)) == [name for name, _ in named[1:]]


def test_lora_plus_gives_b_its_own_rate() -> None:
    groups = group_parameters(adapter_parameters(2), Rates(1e-4, {}, 16.0), 2)
    assert [(g.rate, {n.split(".lora_")[1][0] for n in g.names}) for g in groups] == [(1e-4, {"A"}), (16e-4, {"B"})]


def test_each_layer_moves_at_its_own_rate(tune: Callable, tmp_path: Path) -> None:
    """One update of AdamW moves every weight of B by its rate: the rates that were asked for are those that act."""
    import safetensors.torch

    plans: list[TrainPlan] = []
    rates = {"1": 1e-5, "2-3": 1e-3}
    tune(layer_learning_rates=rates, max_steps=1, warmup_ratio=0.0, hooks=Hooks(on_plan=plans.append))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    for layer, rate in ((0, 1e-5), (1, 1e-3), (2, 1e-3)):
        moved = torch.cat([t.flatten() for n, t in tensors.items() if f"layers.{layer}." in n and "lora_B" in n])
        assert moved.abs().max().item() == pytest.approx(rate, rel=1e-3)
    rows: tuple[RateRow, ...] = plans[0].rates
    assert [(row.layers, row.rate) for row in rows] == [("layers 1", 1e-5), ("layers 2-3", 1e-3)]
    assert sum(row.num_parameters for row in rows) == plans[0].num_trainable


def test_ranks_by_layer(tiny_llama: Path) -> None:
    settings = TuneSettings(output_dir="-", lora_rank=8, lora_target="q_proj", lora_rank_pattern={1: 2, "3": 16})
    model = load_model(tiny_llama)
    adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    ranks = [p.shape[0] for n, p in adapted.named_parameters() if "lora_A" in n]
    assert ranks == [2, 8, 16]
