"""Calibrated rounding: exact numbers on small matrices, and never worse than rounding each weight alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.errors import ModelError
from pingjia.quant.clip import group_scale
from pingjia.quant.encode import PackedMatrix, Root, pack_matrix
from pingjia.quant.gptq import _round, round_groups, round_rows
from pingjia.quant.gram import Gram, root_of, watch
from pingjia.quant.rows import dequantize_rows, quantize_rows
from pingjia.quant.settings import QuantizeSettings


def correlated(columns: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Inputs whose columns have much in common and very different sizes, as a network's have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.add(x)
    return gram


def output_error(x: torch.Tensor, weight: torch.Tensor, packed: PackedMatrix) -> float:
    return float((x @ (weight - packed.dequantize()).T).norm() / (x @ weight.T).norm())


# ---- by hand


def step_1(*_: object) -> torch.Tensor:
    return torch.ones(1)


def test_the_second_column_makes_up_for_the_first() -> None:
    """Both inputs are always equal, so only the sum of both weights counts: 0.4 + 0.4 is 0 + 1, not 0 + 0."""
    root = root_of(torch.ones(2, 2), 1e-4)
    weight = torch.tensor([[0.4, 0.4]])
    fed_back, error = _round(weight, root, 2, step_1, (-8, 7))
    nearest, _ = _round(weight, None, 2, step_1, (-8, 7))
    assert nearest.tolist() == [[0, 0]]
    assert fed_back.tolist() == [[0, 1]]
    torch.testing.assert_close(error, torch.tensor([[0.4, -0.6]]))


def test_an_error_crosses_the_border_of_a_block() -> None:
    """The same with each column in a block of its own."""
    root = root_of(torch.ones(2, 2), 1e-4)
    values, _ = _round(torch.tensor([[0.4, 0.4]]), root, 1, step_1, (-8, 7))
    assert values.tolist() == [[0, 1]]


def test_three_columns_by_hand() -> None:
    """R of a 3 x 3 Gram matrix, and the values its rule gives, worked out with pencil and paper.

    R = [[1, 2, 0], [0, 1, 1], [0, 0, 1]], w = (0.5, 1.3, 2.4), step 1. Column 0: 0.5 -> 0, error 0.5. Column 1: wanted
    1.3 + 0.5 * 2 = 2.3 -> 2, error -0.7. Column 2: wanted 2.4 - 0.7 * 1 = 1.7 -> 2, error 0.4.
    """
    root = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    gram = root @ root.T
    torch.testing.assert_close(root_of(gram.double(), 1e-12).float(), root)
    values, error = _round(torch.tensor([[0.5, 1.3, 2.4]]), root, 3, step_1, (-8, 7))
    assert values.tolist() == [[0, 2, 2]]
    torch.testing.assert_close(error, torch.tensor([[0.5, -0.7, 0.4]]))


def test_blocks_do_not_change_what_is_rounded() -> None:
    x = correlated(64)
    root = root_of(gram_of(x).take(), 0.01)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    whole, _ = _round(weight, root, 64, lambda *_: torch.full((16,), 0.3), (-8, 7))
    for block in (1, 7, 32):
        parts, _ = _round(weight, root, block, lambda *_: torch.full((16,), 0.3), (-8, 7))
        assert (whole != parts).float().mean() < 0.01  # a value exactly between two may fall either way


# ---- the root


@given(st.integers(1, 24), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_root_is_upper_triangular_and_squares_to_the_damped_gram(columns: int, seed: int) -> None:
    gram = gram_of(correlated(columns, 3 * columns, seed)).take()
    root = root_of(gram.clone(), 0.1)
    assert torch.equal(root, root.triu())
    wanted = gram + 0.1 * gram.diagonal().mean() * torch.eye(columns)
    torch.testing.assert_close(root @ root.T, wanted, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))


def test_fewer_tokens_than_columns_still_factor() -> None:
    assert torch.isfinite(root_of(gram_of(correlated(64, 3)).take(), 1e-6)).all()


def test_inputs_that_are_always_zero() -> None:
    assert torch.equal(root_of(torch.zeros(4, 4), 0.01), torch.eye(4))


def test_a_broken_model_is_named() -> None:
    with pytest.raises(ModelError, match=r"layers\.3\.q_proj: its inputs on the calibration text are not finite"):
        root_of(torch.full((2, 2), torch.nan), 0.01, "layers.3.q_proj")


def test_linears_fed_the_same_tensor_share_one_gram() -> None:
    q, k, o = (torch.nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(5, 4)
    with watch({"q": q, "k": k, "o": o}) as grams:
        for _ in range(2):
            o(q(x) + k(x))
    assert grams["q"] is grams["k"]
    assert grams["o"] is not grams["q"]
    assert grams["q"].num_tokens == 10
    torch.testing.assert_close(grams["q"].take(), 2 * x.T @ x)


# ---- against rounding to nearest


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_int4_beats_rounding_to_nearest_on_correlated_inputs(group_size: int, act_order: bool) -> None:
    x = correlated(256)
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)) / 16
    settings = QuantizeSettings(group_size=group_size, act_order=act_order)
    root = Root.of(gram_of(x), settings, "x")
    calibrated, nearest = pack_matrix(weight, 4, settings, root), pack_matrix(weight, 4, settings, None)
    assert output_error(x, weight, calibrated) < 0.8 * output_error(x, weight, nearest)
    assert calibrated.weight.shape == (96, 128)
    assert calibrated.weight_scale.shape == (96, 256 // group_size)
    assert calibrated.weight_scale.dtype == torch.float16


@pytest.mark.parametrize("act_order", [False, True])
def test_int8_beats_rounding_to_nearest_on_correlated_inputs(act_order: bool) -> None:
    x = correlated(200)
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    settings = QuantizeSettings(bits=8, act_order=act_order)
    calibrated = pack_matrix(weight, 8, settings, Root.of(gram_of(x), settings, "x"))
    nearest = pack_matrix(weight, 8, settings, None)
    assert output_error(x, weight, calibrated) < 0.9 * output_error(x, weight, nearest)


def test_the_stated_error_is_the_one_measured() -> None:
    x = correlated(128)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    settings = QuantizeSettings(group_size=32, damping=1e-6)
    packed = pack_matrix(weight, 4, settings, Root.of(gram_of(x), settings, "x"))
    assert packed.relative_error == pytest.approx(output_error(x, weight, packed), rel=0.01)


def test_int8_to_nearest_is_the_published_rounding() -> None:
    weight = torch.randn(9, 40)
    values, scale, _ = round_rows(weight, None)
    wanted, wanted_scale = quantize_rows(weight, 8)
    assert torch.equal(values, wanted)
    assert torch.equal(scale, wanted_scale)


def test_lots_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(64), torch.randn(50, 64)
    settings = QuantizeSettings(group_size=32)
    root = Root.of(gram_of(x), settings, "x")
    whole = pack_matrix(weight, 4, settings, root)
    monkeypatch.setattr("pingjia.quant.encode._LOT_ELEMENTS", 64 * 7)
    parts = pack_matrix(weight, 4, settings, root)
    assert (whole.weight != parts.weight).float().mean() < 0.01  # sums in another order
    torch.testing.assert_close(whole.weight_scale, parts.weight_scale, rtol=1e-2, atol=1e-4)


# ---- scales


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_group_scale_loses_no_more_than_the_plain_ones(seed: int) -> None:
    """Neither than max / 7 nor than the signed max / -8 that llama.cpp takes, both in fp16."""
    target = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
    found = group_scale(target, torch.ones(32))
    signed = target.gather(0, target.abs().argmax(0, keepdim=True))[0]
    for plain in (target.abs().amax(0) / 7, signed / -8):
        assert (loss(target, found) <= loss(target, plain.half().float()) * 1.0001 + 1e-6).all()
    assert torch.equal(found, found.half().float())


def test_without_calibration_the_scale_is_that_of_q4_0() -> None:
    """Against the gguf package, llama.cpp's reference in Python; it divides by the scale before fp16 rounds it."""
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    packed = pack_matrix(weight, 4, QuantizeSettings(group_size=32, method="rtn"), None)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    assert (packed.dequantize() - theirs).abs().gt(1e-6).float().mean() < 0.005


def loss(target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((target / scale).round().clamp(-8, 7) * scale - target).square().sum(0)


def test_weights_on_a_grid_of_16_levels_are_kept_exactly() -> None:
    values = torch.randint(-8, 8, (5, 64))
    values[:, 0] = values[:, 32] = -8
    weight = values * 0.125
    stored, scale, error = round_groups(weight, 32, None)
    assert torch.equal(stored.long(), values)
    assert not error.any()
    assert (scale == 0.125).all()


def test_zeros_stay_zeros() -> None:
    stored, scale, error = round_groups(torch.zeros(3, 64), 64, None)
    assert not stored.any()
    assert not scale.any()
    assert not error.any()
    values, scale, _ = round_rows(torch.zeros(2, 5), None)
    assert not values.any()
    assert not scale.any()


def test_weights_below_half_precision_become_zero_not_infinite() -> None:
    stored, scale, error = round_groups(torch.full((1, 32), 1e-9), 32, None)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(error).all()
    assert stored.abs().max() <= 8


# ---- the published layout, and what is refused


def test_the_published_layout_is_that_of_the_published_files() -> None:
    weight = torch.randn(6, 64)
    settings = QuantizeSettings(method="rtn", head_bits=16, layout="published")
    packed = pack_matrix(weight, 4, settings, None)
    stored, scale = quantize_rows(weight, 4)
    assert torch.equal(packed.weight, stored)
    assert torch.equal(packed.weight_scale, scale)
    lost = weight - dequantize_rows(stored, scale, 4)
    assert packed.relative_error == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bits": 3}, "bits 3: choose 4 or 8"),
        ({"head_bits": 5}, "head bits 5: choose 4, 8 or 16"),
        ({"group_size": 48}, "group size 48: choose 32, 64 or 128"),
        ({"method": "awq"}, "method awq: choose gptq or rtn"),
        ({"damping": 0.0}, "damping 0.0: give a share"),
        ({"layout": "published"}, "give --method rtn"),
        ({"layout": "published", "method": "rtn"}, "give --head-bits 16"),
    ],
)
def test_settings_that_cannot_be_had(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        QuantizeSettings(**changed).check()  # type: ignore[arg-type]
