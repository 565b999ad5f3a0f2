"""The loss in blocks equals the loss in one piece, and so does its gradient, whatever the head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pingjia.quant.formats import Int8Linear
from pingjia.quant.half import HalfLinear
from pingjia.tune import cross_entropy
from pingjia.tune.cross_entropy import losses_for_logits, token_losses

HIDDEN, VOCAB, COUNT = 24, 301, 37


def head_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(4)
    linear = torch.nn.Linear(HIDDEN, VOCAB, bias=kind == "bias")
    if kind == "int8":
        return Int8Linear.of(linear)
    if kind == "half":
        half = HalfLinear(HIDDEN, VOCAB, bias=False)
        half.weight = torch.nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        return half
    return linear.requires_grad_(kind == "learns")


@pytest.fixture(params=[1, 7, 100_000])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many rows of logits may exist at once."""
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", 4 * VOCAB * request.param)
    return int(request.param)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(COUNT, HIDDEN, generator=generator) * 3
    target = torch.randint(VOCAB, (COUNT,), generator=generator)
    return hidden, target, torch.rand(COUNT, generator=generator)


@pytest.mark.parametrize("kind", ["plain", "bias", "half", "int8", "learns"])
def test_loss_and_gradient_equal_the_unchunked(kind: str, rows_at_once: int) -> None:
    found, expected = [], []
    for result, losses in (
        (found, token_losses),
        (expected, lambda h, t, head: F.cross_entropy(head(h), t, reduction="none")),
    ):
        head = head_of(kind)
        hidden, target, weight = inputs()
        hidden.requires_grad_()
        per_token = losses(hidden, target, head)
        (per_token @ weight).backward()
        result += [per_token.detach(), hidden.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    assert len(found) == len(expected) == (3 if kind == "learns" else 2)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=2e-6)


def test_large_logits_do_not_overflow(rows_at_once: int) -> None:
    hidden, target, _ = inputs()
    hidden = (hidden * 200).requires_grad_()
    head = head_of("plain").requires_grad_(False)
    losses = token_losses(hidden, target, head)
    losses.sum().backward()
    torch.testing.assert_close(losses, F.cross_entropy(head(hidden), target, reduction="none"))
    assert torch.isfinite(hidden.grad).all()


def test_no_more_logits_than_allowed_ever_exist(rows_at_once: int) -> None:
    seen: list[int] = []
    head = head_of("plain").requires_grad_(False)
    hidden, target, _ = inputs()

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[0])
        return head(rows)

    token_losses(hidden.requires_grad_(), target, logits_of).sum().backward()
    assert max(seen) == min(rows_at_once, COUNT)
    assert sum(seen) == COUNT, "a head that does not learn is computed once"


def test_without_gradients_and_without_tokens() -> None:
    hidden, target, _ = inputs()
    head = head_of("learns")
    with torch.no_grad():
        assert not token_losses(hidden, target, head).requires_grad
    assert token_losses(hidden[:0].requires_grad_(), target[:0], head).shape == (0,)


def test_fp16_keeps_small_gradients() -> None:
    """In fp16 a probability below 6e-8 is 0: what thousands of unlikely tokens pull with would be lost."""
    hidden, target, _ = inputs()
    head = head_of("plain").requires_grad_(False)
    exact = hidden.half().float().requires_grad_()
    exact_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    exact_head.weight = torch.nn.Parameter(head.weight.detach().half().float(), requires_grad=False)
    token_losses(exact, target, exact_head).sum().backward()
    half = hidden.half().requires_grad_()
    token_losses(half, target, head.half()).sum().backward()
    torch.testing.assert_close(half.grad.float(), exact.grad, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("make", [lambda head: None, lambda head: setattr(head, "forward", head.forward)])
def test_the_head_is_a_head_again_afterwards(make: Callable[[torch.nn.Module], None]) -> None:
    hidden, target, _ = inputs()
    head = head_of("plain")
    make(head)
    before = dict(head.__dict__)
    with losses_for_logits(head, target):
        assert head(hidden.unsqueeze(0)).shape == (1, COUNT)
    assert head.__dict__.keys() == before.keys()
    assert head(hidden).shape == (COUNT, VOCAB)
    with pytest.raises(ZeroDivisionError), losses_for_logits(head, target):
        raise ZeroDivisionError
    assert head(hidden).shape == (COUNT, VOCAB)
