"""Float32 products by the faster library are float32 products, and what follows them finds everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pingjia.tune import products
from pingjia.tune.products import fast_products


def precision() -> str:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return str(matmul.fp32_precision)


@pytest.fixture
def forget() -> Iterator[None]:
    """The decision is made anew, before and after."""
    products._is_onednn_faster.cache_clear()
    yield
    products._is_onednn_faster.cache_clear()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, 64), (300, 576, 1536), (257, 1536, 16), (33, 7, 5)])
def test_products_are_as_exact_as_before(tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    exact = x.double() @ w.double().T
    with fast_products():
        found = [x @ w.T, torch.nn.functional.linear(x, w), torch.zeros(tokens, outputs).addmm_(x, w.T)]
    for product in found:
        assert (product - exact).abs().max() < 3e-6 * exact.abs().max()


def test_the_switch_is_put_back(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: True)
    before = precision()

    @fast_products()
    def fail() -> None:
        raise ValueError(precision())

    with pytest.raises(ValueError, match="bf16"):
        fail()
    assert precision() == before


def test_no_switch_where_products_would_be_rounded(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AMD processor with matrix units for bfloat16, should there be one: the trial product shows it."""
    monkeypatch.setattr(products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(products, "_FLOAT32_ERROR", 1e-12)  # no float32 product is that exact
    before = precision()
    with fast_products():
        assert precision() == before


def test_no_switch_on_other_processors(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: "GenuineIntel")
    before = precision()
    with fast_products():
        assert precision() == before


def test_rounding_to_bfloat16_would_be_noticed() -> None:
    """The bound lies between the two formats, with room on both sides."""
    torch.manual_seed(0)
    a, b = torch.randn(256, 512), torch.randn(256, 512)
    exact = a.double() @ b.double().T
    rounded = a.bfloat16().double() @ b.bfloat16().double().T
    assert (rounded - exact).abs().max() / exact.abs().max() > 100 * products._FLOAT32_ERROR
    assert (a @ b.T - exact).abs().max() / exact.abs().max() < products._FLOAT32_ERROR / 3
