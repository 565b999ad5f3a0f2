"""Blocks that are used again: never while somebody holds them, always afterwards."""

from __future__ import annotations

import random

import torch

from pingjia.tune.buffers import LEAST_BYTES, Buffers

WIDTH = 512
ROWS = LEAST_BYTES // (4 * WIDTH) + 8


def like(num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(num_rows, 1, dtype=dtype)


def test_a_block_comes_back_when_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers()
    first = buffers.empty(like(ROWS), WIDTH)
    at, view = first.data_ptr(), first[3:5].view(-1)
    del first
    assert buffers.num_free == 0, "a view holds it"
    assert buffers.empty(like(ROWS), WIDTH).data_ptr() != at
    del view
    assert buffers.empty(like(ROWS - 1), WIDTH).data_ptr() == at, "for fewer rows too"


def test_what_autograd_keeps_is_in_use() -> None:
    buffers = Buffers()
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    kept = buffers.empty(like(ROWS), WIDTH).fill_(2.0)
    loss = (x * kept).sum()
    del kept
    assert buffers.num_free == 0
    buffers.empty(like(ROWS), WIDTH).fill_(9.0)
    loss.backward()
    assert x.grad is not None
    assert bool((x.grad == 2.0).all())
    del loss
    assert buffers.num_free == 2


def test_no_two_that_are_held_share_memory() -> None:
    """Arbitrary sizes taken and let go: what is written stays what it was."""
    dice, buffers, held = random.Random(0), Buffers(), []
    for mark in range(200):
        rows, width = ROWS + dice.randrange(40), dice.choice([WIDTH, 2 * WIDTH])
        held.append((mark, buffers.empty(like(rows), width).fill_(mark)))
        if len(held) > 4:
            number, matrix = held.pop(dice.randrange(len(held)))
            assert bool((matrix == number).all())
        if mark % 50 == 49:
            buffers.clear()
    assert all(bool((matrix == number).all()) for number, matrix in held)


def test_cleared_blocks_do_not_come_back() -> None:
    buffers = Buffers()
    held, free = buffers.empty(like(ROWS), WIDTH), buffers.empty(like(ROWS), WIDTH)
    del free
    buffers.clear()
    assert buffers.num_free == 0
    del held
    assert buffers.num_free == 0


def test_more_rows_replace_the_blocks_of_fewer() -> None:
    buffers = Buffers()
    held, free = buffers.empty(like(ROWS), WIDTH), buffers.empty(like(ROWS), WIDTH)
    del free
    longer = buffers.empty(like(2 * ROWS), WIDTH)
    assert buffers.num_free == 0
    del held
    assert buffers.num_free == 0
    del longer
    assert buffers.num_free == 1


def test_small_ones_and_other_formats_are_plain() -> None:
    buffers = Buffers()
    small, double = buffers.empty(like(1), WIDTH), buffers.empty(like(ROWS, torch.float64), WIDTH)
    assert (small.shape, small.dtype) == ((1, WIDTH), torch.float32)
    assert (double.shape, double.dtype) == ((ROWS, WIDTH), torch.float64)
    del small, double
    assert buffers.num_free == 0
