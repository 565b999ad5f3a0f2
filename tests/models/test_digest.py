"""One changed value anywhere is another network; the same values again are the same one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.models.digest import weights_digest


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(70, 33, generator=generator).to(dtype))
        self.register_buffer("packed", torch.randint(0, 255, (4097,), dtype=torch.uint8, generator=generator))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("scalar", torch.tensor(1.5))
        self.register_buffer("mask", torch.tensor([True, False]))


def test_equal_values_are_one() -> None:
    assert weights_digest(Net()) == weights_digest(Net())
    assert weights_digest(Net(1)) != weights_digest(Net())


def test_the_number_format_counts() -> None:
    """What is packed otherwise answers otherwise."""
    assert weights_digest(Net(dtype=torch.bfloat16)) != weights_digest(Net())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["a", "packed", "scalar"]), st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_is_seen(name: str, place: int, bits: int) -> None:
    net = Net()
    before = weights_digest(net)
    data = dict([*net.named_parameters(), *net.named_buffers()])[name].detach().view(-1).view(torch.uint8)
    data[place % data.numel()] ^= bits
    assert weights_digest(net) != before


@pytest.mark.parametrize("name", ["mask", "empty"])
def test_names_count(name: str) -> None:
    net = Net()
    before = weights_digest(net)
    value = net._buffers.pop(name)
    net.register_buffer(f"{name}2", value)
    assert weights_digest(net) != before
