"""Grouped INT4 and INT8: the bytes, the product and its gradient, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.errors import ModelError
from pingjia.quant.encode import pack_matrix
from pingjia.quant.group import (
    GroupEmbedding,
    GroupInt4Linear,
    GroupInt8Linear,
    dequantize_groups,
    group_product,
    group_size_for,
    pack_groups,
    unpack_groups,
)
from pingjia.quant.rows import dequantize_rows, quantize_rows
from pingjia.quant.settings import QuantizeSettings


def random_linear(rows: int, columns: int, group: int, seed: int = 0) -> GroupInt4Linear:
    torch.manual_seed(seed)
    linear = GroupInt4Linear(columns, rows, group_size=group)
    linear.weight.copy_(torch.randint(0, 256, linear.weight.shape, dtype=torch.uint8))
    linear.weight_scale.copy_(torch.rand(linear.weight_scale.shape) / 8)
    linear.bias.copy_(torch.randn(rows))
    return linear


def by_hand(linear: GroupInt4Linear) -> torch.Tensor:
    """The float matrix, one element at a time as the layout is written down."""
    weight = torch.empty(linear.out_features, linear.in_features, dtype=torch.float64)
    for n in range(linear.out_features):
        for m in range(linear.in_features):
            byte = int(linear.weight[n, m // 2])
            nibble = byte & 0xF if m % 2 == 0 else byte >> 4
            weight[n, m] = (nibble - 8) * float(linear.weight_scale[n, m // linear.group_size])
    return weight


def test_the_low_nibble_is_the_even_column() -> None:
    packed = pack_groups(torch.tensor([[-8, 7, 0, -1]]))
    assert packed.tolist() == [[0xF0, 0x78]]
    assert unpack_groups(packed).tolist() == [[-8, 7, 0, -1]]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_packing_loses_nothing(rows: int, pairs: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_groups(pack_groups(values)).long(), values)


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (5, 64, 32), (3, 576, 64), (7, 384, 128)])
def test_dequantize_is_what_the_layout_says(rows: int, columns: int, group: int) -> None:
    linear = random_linear(rows, columns, group)
    assert torch.equal(linear.dequantize().double(), by_hand(linear))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (0, 64)])
def test_the_product_and_its_gradient_are_those_of_the_float_matrix(shape: tuple[int, ...]) -> None:
    linear = random_linear(1000, 64, 32)
    weight = linear.dequantize()
    x, y = (torch.randn(shape).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    out, wanted = linear(x), torch.nn.functional.linear(y, weight, linear.bias)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(out)
    out.backward(seed)
    wanted.backward(seed)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-5)


def test_half_precision_in_half_precision_out() -> None:
    linear = random_linear(8, 64, 32)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert linear(x).dtype == torch.bfloat16
    assert group_product(x, linear.weight, linear.weight_scale).shape == (2, 8)


def test_an_embedding_looks_up_rows_of_the_same_matrix() -> None:
    linear = random_linear(10, 64, 32)
    table = GroupEmbedding(linear.weight.data, linear.weight_scale)
    ids = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(table(ids), linear.dequantize()[ids])
    assert table.num_weights == linear.num_weights == 640


@pytest.mark.parametrize(
    ("columns", "asked", "found"), [(576, 128, 64), (1536, 128, 128), (96, 128, 32), (96, 64, 32), (4096, 32, 32)]
)
def test_the_group_is_the_largest_that_divides(columns: int, asked: int, found: int) -> None:
    assert group_size_for(columns, asked) == found


def test_no_group_fits() -> None:
    with pytest.raises(ModelError, match=r"down_proj has 100 columns.*bits=8"):
        group_size_for(100, 64, "down_proj")
    with pytest.raises(ModelError, match="group size 48: choose 32, 64, 128"):
        group_size_for(4096, 48)


def test_a_new_layer_is_zero_and_frozen() -> None:
    linear = GroupInt4Linear(64, 3, bias=False)
    assert not linear.dequantize().any()
    assert not any(p.requires_grad for p in linear.parameters())
    assert dequantize_groups(linear.weight, linear.weight_scale, torch.float16).dtype == torch.float16


def test_grouped_int8_is_its_values_times_their_scales_in_product_and_gradient() -> None:
    torch.manual_seed(0)
    linear = GroupInt8Linear(96, 5, bias=False, group_size=32)
    values = torch.randint(-127, 128, (5, 96), dtype=torch.int8)
    linear.weight.data, linear.weight_scale = values, (torch.rand(5, 3) / 100).half()
    weight = values.float() * linear.weight_scale.float().repeat_interleave(32, dim=1)
    torch.testing.assert_close(linear.dequantize(), weight)
    x = torch.randn(2, 3, 96, requires_grad=True)
    torch.testing.assert_close(linear(x), x @ weight.T)
    grad = torch.randn(2, 3, 5)
    (found,) = torch.autograd.grad(linear(x), x, grad)
    torch.testing.assert_close(found, grad @ weight)


def test_int8_without_a_group_that_fits_has_a_scale_per_row() -> None:
    chosen = QuantizeSettings(bits=8)
    assert pack_matrix(torch.randn(4, 96), 8, chosen, None).weight_scale.shape == (4, 3)
    assert pack_matrix(torch.randn(4, 100), 8, chosen, None).weight_scale.shape == (4,)


def test_groups_of_int8_lose_less_than_rows() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    grouped = pack_matrix(weight, 8, QuantizeSettings(bits=8, method="rtn"), None).dequantize()
    stored, scale = quantize_rows(weight, 8)
    per_row = dequantize_rows(stored, scale, 8)
    assert (grouped - weight).square().mean() < 0.6 * (per_row - weight).square().mean()
