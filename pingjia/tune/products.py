"""Which library multiplies float32 matrices on a CPU. Nothing about formats: what is computed stays float32.

torch takes MKL, which on AMD processors leaves AVX-512 unused: half the arithmetic they can do. oneDNN, which torch has
too, uses it. The only switch that leads there also allows oneDNN to round to bfloat16, which it does where there are
matrix units for that (AMX). So it is taken on AMD processors only, and only after a product has shown that nothing was
rounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_KEPT_PRODUCTS = 96
_FLOAT32_ERROR = 1e-5
"""Largest error of a product of 512 terms, as a share of its largest result. float32 gives 1e-6, bfloat16 4e-3."""


@contextmanager
def fast_products() -> Iterator[None]:
    """While open, float32 products on a CPU go to whichever library is faster at them, in the whole process."""
    if not _is_onednn_faster():
        yield
        return
    with _allowed_to_round():
        yield


@cache
def _is_onednn_faster() -> bool:
    """Decided by the processor, not by a clock: a run that goes on from a checkpoint must compute as it began."""
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    is_wide = has_both and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (is_wide and _vendor() == "AuthenticAMD"):
        return False
    _bound_caches()
    return _keeps_float32()


def _bound_caches() -> None:
    """Let oneDNN, and torch before it, keep the code of so many kinds of products. Read when the first one is computed.

    Each kind is a size, and every update has another number of tokens: the 1024 that both keep by themselves came to
    more than a gigabyte in 240 updates. 96 hold those of an update; with 48 it took a fifth longer.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KEPT_PRODUCTS))


def _vendor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def _keeps_float32() -> bool:
    """Whether oneDNN, allowed to round, does not."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    with _allowed_to_round():
        error = (a @ b.T - exact).abs().max() / exact.abs().max()
    return bool(error < _FLOAT32_ERROR)


@contextmanager
def _allowed_to_round() -> Iterator[None]:
    """Products by oneDNN, in whatever format it sees fit down to bfloat16."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
