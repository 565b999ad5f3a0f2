"""Products of packed weights: ours beside torch's float32 linear and fbgemm's int8, and the memory's own speed.

Usage: python benchmarks/kernels.py [--seconds 0.2] [--isa avx2] [--out benchmarks/results/kernels.json]
Every figure is the median of repeated calls over enough copies of the matrix that none stays in the cache. GB/s count
the stored bytes (weights and scales) read once per call, so at batch 1 they compare with `read_gb_s`, a plain sum over
memory by the same threads in the same run. `tok/s` is what a network of 6.2 billion weights would reach if it were
made of such products only. Beside INT8 weights x keeps 16 bits, beside INT4 ones 8. fbgemm is measured with its
default reduced range on x86. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pingjia.quant import kernels
from pingjia.quant.native import Tiles

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (576, 576), (1536, 576))
BATCHES = (1, 4, 8, 64, 512)
REAL_SIZE = 6.2e9  # weights of ChatGLM-6B
CACHE_BYTES = 100e6  # copies of a matrix take at least this much, so that every call reads memory
Product = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring per figure")
    parser.add_argument("--isa", help="measure this instruction set instead of the best")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
    if options.isa:
        kernels.choose_isa(options.isa)
    torch.set_num_threads(kernels.num_threads())
    results = {"read_gb_s": read_speed(options.seconds), "products": list(measure_all(options.seconds))}
    found = {**conditions(), **results}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def read_speed(seconds: float) -> float:
    memory = torch.ones(int(2 * CACHE_BYTES) // 65536 * 65536, dtype=torch.uint8)
    taken = median_seconds(lambda: kernels.library().pj_read_all(memory.data_ptr(), memory.nbytes), seconds)
    print(f"{kernels.isa()}, {kernels.num_threads()} threads; plain reading {memory.nbytes / taken / 1e9:.1f} GB/s")
    return memory.nbytes / taken / 1e9


def measure_all(seconds: float):  # type: ignore[no-untyped-def]
    for n, m in SHAPES:
        for name, (stored, make) in KINDS.items():
            copies = max(1, min(64, int(CACHE_BYTES / (n * m * stored))))
            products = [make(n, m) for _ in range(copies)]
            for batch in BATCHES:
                yield report(name, n, m, stored, batch, products, seconds)


def report(  # type: ignore[no-untyped-def]
    name: str, n: int, m: int, stored: float, batch: int, products: list[Product], seconds: float
):
    x = torch.randn(batch, m)

    def call() -> None:
        for product in used:
            product(x)

    used = products if batch < 64 else products[:2]
    with torch.inference_mode():
        taken = median_seconds(call, seconds) / len(used)
    figures = {"gb_s": n * m * stored / taken / 1e9, "tok_s": batch * n * m / taken / REAL_SIZE}
    print(f"{n:>6} x {m:<6} {name:<14} batch {batch:<4} {figures['gb_s']:6.1f} GB/s {figures['tok_s']:7.1f} tok/s")
    return {"n": n, "m": m, "kind": name, "batch": batch, "ms": taken * 1e3, **figures}


def median_seconds(call: Callable[[], Any], seconds: float) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def grouped_int4(n: int, m: int) -> Product:
    group = 128 if m % 128 == 0 else 64
    weight = torch.randint(0, 256, (n, m // 2), dtype=torch.uint8)
    return Tiles.of(weight, torch.rand(n, m // group).half(), 4).product


def row_int4(n: int, m: int) -> Product:
    return Tiles.of(torch.randint(-128, 128, (n, m // 2), dtype=torch.int8), torch.rand(n), 4).product


def row_int8(n: int, m: int) -> Product:
    return Tiles.of(torch.randint(-127, 128, (n, m), dtype=torch.int8), torch.rand(n), 8).product


def float32(n: int, m: int) -> Product:
    weight = torch.randn(n, m)
    return lambda x: torch.nn.functional.linear(x, weight)


def fbgemm(n: int, m: int) -> Product:
    weight = torch.randn(n, m)
    points = torch.zeros(n, dtype=torch.int64)  # integers: float ones would select another, broken scheme
    stored = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, points, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(stored, None)

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(x, packed, True)

    x = torch.randn(4, m)
    error = (product(x) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert error < 0.05, f"fbgemm is off by {error:.1%}: nothing to compare with"
    return product


KINDS: dict[str, tuple[float, Callable[[int, int], Product]]] = {
    "int4 groups": (0.5 + 2 / 128, grouped_int4),
    "int4 rows": (0.5, row_int4),
    "int8 rows": (1.0, row_int8),
    "fbgemm int8": (1.0, fbgemm),
    "torch float32": (4.0, float32),
}
"""Name -> (bytes of a weight with its scale, maker of one product)."""


def conditions() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "cpu": cpu_name(),
        "isa": kernels.isa(),
        "threads": kernels.num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
