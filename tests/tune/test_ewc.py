"""Elastic weight consolidation: the springs are the squared gradients, the pull is their analytic gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune.ewc import adapter_parameters, ewc_penalty, fisher, read_fisher, spread, write_fisher
from pingjia.types import Encoded

ROWS = [
    Encoded((5, 6, 7, 8, 9), (False, False, True, True, True)),
    Encoded((11, 12, 13), (False, True, True), weight=3.0),
]


@pytest.fixture
def model(tiny_llama: Path) -> PeftModel:
    network = load_model(tiny_llama)
    use_packed_attention(network)
    torch.manual_seed(0)
    adapted = get_peft_model(network, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "up_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return adapted


def test_the_springs_are_mean_squared_gradients_of_each_row(model: PeftModel, tiny_llama: Path) -> None:
    """Against plain torch: transformers' own attention, one row at a time, no dropout, row weights left out."""
    family = family_of(model.get_base_model())
    model.train()
    got = fisher(model, family, ROWS)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.get_base_model().set_attn_implementation("eager")
    model.eval()
    expected: dict[str, torch.Tensor] = {}
    for row in ROWS:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        loss = -sum(logits[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.learn[i])
        loss.backward()
        for name, p in adapter_parameters(model).items():
            expected[name] = expected.get(name, 0) + p.grad.square()
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[name], expected[name] / 5, rtol=1e-3, atol=1e-12) for name in got)


def test_the_pull_of_the_springs_is_analytic() -> None:
    torch.manual_seed(1)
    theta = {n: torch.nn.Parameter(torch.randn(3, 4)) for n in "ab"}
    springs, rest = ({n: torch.rand(3, 4) for n in "ab"} for _ in range(2))
    value = ewc_penalty(theta, springs, rest, 7.0)
    value.backward()
    for name, p in theta.items():
        assert torch.allclose(p.grad, 7.0 * springs[name] * (p.detach() - rest[name]), atol=1e-6)
    assert value.item() == pytest.approx(sum(3.5 * (springs[n] * (theta[n] - rest[n]) ** 2).sum().item() for n in "ab"))


def test_orthogonality_has_its_analytic_gradient(tiny_llama: Path, tmp_path: Path) -> None:
    from pingjia.tune.grow import grow_beside, orthogonality

    config = LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.3)
    network = get_peft_model(load_model(tiny_llama), config)
    tensors = {n.replace(".default", ""): torch.randn_like(p) for n, p in network.named_parameters() if "lora_" in n}
    fresh = get_peft_model(load_model(tiny_llama), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    grow_beside(fresh, tensors, config)
    assert orthogonality(fresh, 4.0).item() == pytest.approx(0, abs=1e-8)
    learning = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in learning)
    for p in learning.values():
        p.data.normal_()
    orthogonality(fresh, 4.0).backward()
    pairs = 0
    for name, new in learning.items():
        old = tensors.get(name.replace(".default", ""))
        if old is None or "lora_B" in name:
            assert new.grad is None
            continue
        pairs += 1
        assert torch.allclose(new.grad, 8.0 * new.detach() @ old.T @ old, rtol=1e-4, atol=1e-4)
    assert pairs == 3


def test_springs_of_another_adapter_are_not_taken(tmp_path: Path) -> None:
    write_fisher(tmp_path, {"a": torch.ones(2)}, "key")
    assert read_fisher(tmp_path, "other") is None
    found = read_fisher(tmp_path, "key")
    assert found is not None
    assert torch.equal(found["a"], torch.ones(2))
    assert read_fisher(tmp_path / "nothing", "key") is None


def test_spread_takes_rows_from_everywhere() -> None:
    rows = [Encoded((n,), (True,)) for n in range(10)]
    assert [row.ids[0] for row in spread(rows, 3)] == [0, 3, 6]
    assert spread(rows, 10) == rows
