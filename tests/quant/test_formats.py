"""The published INT8/INT4 layout: rounding, packing, products and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pingjia.quant import FORMATS, HalfLinear, Int4Linear, Int8Linear
from pingjia.quant import rows as layout
from pingjia.quant.formats import PackedLinear, linear_class
from pingjia.quant.rows import dequantize_rows, pack_int4, quantize_rows, row_blocks, unpack_int4

KINDS = pytest.mark.parametrize("kind", [Int4Linear, Int8Linear])


def linear(rows: int = 12, columns: int = 10, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(columns, rows)
    made.weight.data *= torch.logspace(-2, 1, rows)[:, None]
    return made


# ---- layout


def test_the_high_nibble_is_the_even_column() -> None:
    assert pack_int4(torch.tensor([[1, -2, -8, 7]], dtype=torch.int8)).tolist() == [[0x1E, -0x80 + 7]]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_packing_loses_nothing(seed: int) -> None:
    values = torch.randint(-8, 8, (3, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(values)), values)


@pytest.mark.parametrize(("bits", "largest"), [(4, 7), (8, 127)])
def test_rounding_is_to_the_nearest_step_of_each_row(bits: int, largest: int) -> None:
    weight = linear().weight.detach()
    packed, scale = quantize_rows(weight, bits)
    assert torch.equal(scale, weight.abs().amax(dim=1) / largest)
    values = unpack_int4(packed) if bits == 4 else packed
    assert int(values.abs().max()) == largest
    error = (dequantize_rows(packed, scale, bits) - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_stays_zero(bits: int) -> None:
    weight = linear().weight.detach()
    weight[3] = 0
    packed, scale = quantize_rows(weight, bits)
    assert scale[3] == 0
    assert (dequantize_rows(packed, scale, bits)[3] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_small_blocks_give_the_same_as_large_ones(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear().weight.detach()
    whole = quantize_rows(weight, bits)
    monkeypatch.setattr(layout, "_BLOCK_ELEMENTS", 25)
    assert len(row_blocks(12, 10)) == 6
    parts = quantize_rows(weight, bits)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_blocks_cover_every_row_once(num_rows: int, num_columns: int) -> None:
    covered = [i for block in row_blocks(num_rows, num_columns) for i in range(block.start, block.stop)]
    assert covered == list(range(num_rows))


# ---- products


@KINDS
@pytest.mark.parametrize("blocks", [1, 5])
def test_products_and_gradients_are_those_of_the_dequantised_weight(
    kind: type[PackedLinear], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_BLOCK_ELEMENTS", 120 // blocks)
    packed = kind.of(linear())
    x = torch.randn(2, 3, 10, requires_grad=True)
    y = packed(x)
    reference_x = x.detach().clone().requires_grad_()
    reference = nn.functional.linear(reference_x, packed.dequantize(), packed.bias.detach())
    assert torch.allclose(y, reference, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    reference.backward(upstream)
    assert torch.allclose(x.grad, reference_x.grad, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("shape", [(10,), (0, 10), (1, 10), (2, 1, 10)])
def test_products_keep_the_shape(kind: type[PackedLinear], shape: tuple[int, ...]) -> None:
    assert kind.of(linear())(torch.randn(shape)).shape == (*shape[:-1], 12)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_half_precision_out(kind: type[PackedLinear], dtype: torch.dtype) -> None:
    packed = kind.of(linear())
    x = torch.randn(4, 10)
    y = packed(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), packed(x), rtol=0.05, atol=0.2)


@KINDS
def test_the_weight_itself_never_trains(kind: type[PackedLinear]) -> None:
    packed = kind.of(linear())
    assert not packed.weight.requires_grad
    assert packed.weight.dtype == torch.int8
    with pytest.raises(RuntimeError, match="floating point"):
        packed.weight.requires_grad_()


def test_the_registry_is_the_two_formats() -> None:
    assert {"int8": Int8Linear, "int4": Int4Linear} == FORMATS
    assert [linear_class(bits) for bits in (None, 0, 4, 8)] == [nn.Linear, nn.Linear, Int4Linear, Int8Linear]


@KINDS
def test_names_of_the_tensors_are_the_published_ones(kind: type[PackedLinear]) -> None:
    packed = kind(10, 12)
    shapes = {n: tuple(t.shape) for n, t in packed.state_dict().items()}
    assert shapes == {"weight": (12, 10 * packed.bits // 8), "weight_scale": (12,), "bias": (12,)}
    assert packed.num_weights == 120
    assert f"bits={packed.bits}" in repr(packed)
    assert (kind(10, 12, bias=False)(torch.ones(1, 10)) == 0).all()


# ---- the half-precision head


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_head_stored_in_half_precision_multiplies_in_float32(stored: torch.dtype) -> None:
    head = HalfLinear(10, 12)
    head.weight.data = head.weight.data.to(stored)
    head.weight.requires_grad_(False)
    x = torch.randn(3, 10, requires_grad=True)
    y = head(x)
    reference = nn.functional.linear(x.detach(), head.weight.float(), head.bias)
    assert y.dtype == torch.float32
    assert torch.allclose(y, reference, rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert torch.allclose(x.grad, head.weight.float().sum(0).expand(3, 10), rtol=1e-5, atol=1e-6)


def test_a_head_in_one_dtype_is_a_plain_linear() -> None:
    head = HalfLinear(10, 12)
    x = torch.randn(3, 10)
    assert torch.equal(head(x), nn.functional.linear(x, head.weight, head.bias))
    head(x).sum().backward()
    assert head.weight.grad is not None
