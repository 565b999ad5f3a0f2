"""Float32 products by the faster library are float32 products, and what follows them finds everything as it was."""

from __future__ import annotations

import subprocess
import sys
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


MANY_SIZES = """
import torch
from pingjia.tune.products import fast_products
from pingjia.tune.relief import resident_bytes

weights = [torch.randn(1536, 576), torch.randn(576, 1536), torch.randn(576, 576)]

def multiply(num_tokens):
    for weight in weights:
        (torch.randn(num_tokens, weight.shape[1]) @ weight.T) @ weight

with fast_products():
    multiply(440)
    before = resident_bytes()
    for num_tokens in range(200, 440, 2):
        multiply(num_tokens)
    print((resident_bytes() - before) // 1_000_000)
"""


def test_updates_of_many_sizes_do_not_fill_the_memory() -> None:
    """Without a bound on what oneDNN keeps these 720 products left 555 MB behind; with it 120 to 270."""
    done = subprocess.run([sys.executable, "-c", MANY_SIZES], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 350
