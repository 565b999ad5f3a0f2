"""Linears packed by bitsandbytes: what they compute, on the CPU too, and what is said where the package is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from pingjia.errors import ModelError
from pingjia.models.packing import pick_packing, stored_bits
from pingjia.models.settings import ModelSettings
from pingjia.quant import bnb, count_weights
from pingjia.quant.bnb import BnbFormat, is_packed_by_bnb, pack_with_bnb, replace_linears

needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is needed: pip install 'pingjia[bnb]'"
)
FORMS = [BnbFormat(4), BnbFormat(4, "fp4"), BnbFormat(4, "nf4", double=False), BnbFormat(8)]
CPU = torch.device("cpu")


def floats_of(linear: Any) -> torch.Tensor:
    """The weight that a packed linear stands for, by bitsandbytes' own unpacking."""
    import bitsandbytes.functional

    if linear.weight.dtype == torch.int8:
        codes, scale = (
            (linear.weight.CB, linear.weight.SCB) if linear.state.CB is None else (linear.state.CB, linear.state.SCB)
        )
        return codes.float() * scale[:, None] / 127
    unpacked: torch.Tensor = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return unpacked


@needs_bnb
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_product_and_gradient_are_those_of_the_unpacked_weight(form: BnbFormat) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96)
    packed = pack_with_bnb(linear, form, CPU).train()
    x = torch.randn(1, 17, 128, requires_grad=True)
    y = packed(x)
    weight, slope = floats_of(packed), torch.randn_like(y)
    y.backward(slope)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, slope @ weight, rtol=1e-5, atol=1e-5)
    assert (weight - linear.weight).norm() / linear.weight.norm() < (0.02 if form.bits == 8 else 0.15)
    assert not any(p.requires_grad for p in packed.parameters())


@needs_bnb
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_look_in_between_does_not_change_the_gradient(form: BnbFormat) -> None:
    """On some CPUs bitsandbytes repacks for inference, and would then train on another layout."""
    torch.manual_seed(0)
    packed: Any = pack_with_bnb(torch.nn.Linear(64, 64), form, CPU)
    assert not getattr(packed, "support_avx512bf16_for_cpu", False)
    x = torch.randn(3, 64, requires_grad=True)
    gradients = []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(packed.train()(x).sum(), x)
        gradients.append(gradient)
        with torch.no_grad():
            packed.eval()(x)
    assert torch.equal(*gradients)


@needs_bnb
def test_it_is_counted_and_named(tiny_network: torch.nn.Module) -> None:
    before = count_weights(tiny_network)
    replace_linears(tiny_network, ["0", "1"], BnbFormat(4), CPU)
    assert count_weights(tiny_network) == before
    assert all(is_packed_by_bnb(m) for m in tiny_network)
    assert stored_bits(tiny_network) == "4 bits by bitsandbytes (nf4)"
    assert str(BnbFormat(4)) == "bitsandbytes NF4, double quantization"


@pytest.fixture
def tiny_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))


def recipe(**changed: Any) -> ModelSettings:
    return ModelSettings(model_name_or_path="x", **changed)


def test_which_way_a_recipe_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("pingjia.models.packing.is_installed", lambda: True)
    monkeypatch.setattr(bnb, "is_installed", lambda: True)
    assert pick_packing(recipe(quantization_method="bitsandbytes"), CPU) is None
    assert pick_packing(recipe(quantization_bit=4), CPU) == 4
    assert pick_packing(recipe(quantization_bit=4), cuda) == BnbFormat(4)
    assert pick_packing(recipe(quantization_bit=8, quantization_method="pingjia"), cuda) == 8
    given = recipe(quantization_bit=4, quantization_method="bnb", quantization_type="fp4", double_quantization=False)
    assert pick_packing(given, CPU) == BnbFormat(4, "fp4", False)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pingjia.models.packing.is_installed", lambda: False)
    monkeypatch.setattr(bnb, "is_installed", lambda: False)
    assert pick_packing(recipe(quantization_bit=4), torch.device("cuda")) == 4
    with pytest.raises(ModelError, match=r"needs bitsandbytes; run: pip install 'pingjia\[bnb\]'"):
        pick_packing(recipe(quantization_bit=4, quantization_method="bitsandbytes"), CPU)
