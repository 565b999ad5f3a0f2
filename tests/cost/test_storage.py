"""Adapters against full checkpoints."""

from __future__ import annotations

import pytest

from pingjia.cost import compare_storage
from pingjia.errors import UserError


def test_the_base_is_kept_once_beside_adapters() -> None:
    found = compare_storage(base_bytes=13_000, adapter_bytes=30, num_models=10)
    assert (found.full_bytes, found.adapter_bytes, found.saved_bytes) == (130_000, 13_300, 116_700)
    assert found.share == 13_300 / 130_000


def test_one_model_saves_nothing() -> None:
    assert compare_storage(base_bytes=100, adapter_bytes=1).saved_bytes == -1


@pytest.mark.parametrize(("base", "adapter", "models"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_sizes_that_are_none(base: int, adapter: int, models: int) -> None:
    with pytest.raises(UserError, match="storage needs"):
        compare_storage(base_bytes=base, adapter_bytes=adapter, num_models=models)
