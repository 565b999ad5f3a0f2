"""The compiled inner loops of calibrated rounding against their plain form in torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.quant import clip, gptq, kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")


def matrix(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, M] and a root [M, M]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator)
    root = torch.linalg.cholesky((x.T @ x + torch.eye(columns)).flip(0, 1)).flip(0, 1)
    return torch.randn(rows, columns, generator=generator), root


def in_torch(monkeypatch: pytest.MonkeyPatch, call: object, *arguments: object) -> tuple[torch.Tensor, ...]:
    with monkeypatch.context() as patch:
        for module in (clip, gptq):
            patch.setattr(module, "is_compiled", lambda _: False)
        return call(*arguments)  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("isa", kernels.isa_names() if kernels.available() else [])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 64, 32), (5, 96, 32), (35, 128, 64), (64, 256, 128)])
def test_compiled_rounding_is_that_of_torch(
    rows: int, columns: int, group: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernels.isa()
    kernels.choose_isa(isa)
    try:
        for call, arguments in (
            (gptq.round_groups, (*matrix(rows, columns, 1)[:1], group, matrix(rows, columns, 1)[1])),
            (gptq.round_rows, matrix(rows, columns, 2)),
        ):
            values, scales, errors = call(*arguments)  # type: ignore[operator]
            plain_values, plain_scales, plain_errors = in_torch(monkeypatch, call, *arguments)
            assert (values != plain_values).float().mean() < 0.01  # a sum that ends in a half may fall either way
            assert (scales != plain_scales).float().mean() < 0.02
            assert abs(float(errors.norm() / plain_errors.norm()) - 1) < 0.01
    finally:
        kernels.choose_isa(before)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=st.sampled_from([32, 64, 128]), seed=st.integers(0, 2**16))
def test_the_compiled_search_loses_no_more_than_any_scale_it_tries(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, importance = torch.randn(columns, rows, generator=generator), torch.rand(columns, generator=generator)
    found = clip.group_scale(target, importance)
    assert torch.equal(found, found.half().float())

    def loss(scale: torch.Tensor) -> torch.Tensor:
        rounded = (target / clip.divisor(scale)).round().clamp(clip.LOW, clip.HIGH) * scale
        return ((rounded - target).square() * importance[:, None]).sum(0)

    largest = target.abs().amax(0) / 8
    for ratio in clip._SIGNED.tolist():
        assert (loss(found) <= loss((ratio * largest).half().float()) * (1 + 1e-4) + 1e-9).all()


def test_the_error_given_back_belongs_to_the_values() -> None:
    weight, root = matrix(20, 128, 3)
    values, scale, error = gptq.round_rows(weight, root)
    torch.testing.assert_close(weight - values * scale[:, None], error)
