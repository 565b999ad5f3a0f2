"""Three times more than can be computed, over HTTP and a real Redis: a short run of benchmarks/overload.py.

How much is of use and in time depends on who else computes here: the benchmark says it (docs/queue.md), the simulation
asserts it (test_overload.py). Here: everybody gets an end, and nothing grows.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "overload.py"


@pytest.fixture(scope="module")
def figures():
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: there is no redis-server here; see tests/debian-packages.txt")
    spec = importlib.util.spec_from_file_location("pingjia_benchmarks_overload", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.measure(seconds=6.0, overload=3.0, num_keys=0, deadline_s=4.0)


def test_it_was_an_overload_and_whoever_waits_as_told_gets_in(figures):
    assert figures["counts"]["refused"] > 0.4 * figures["asked"], figures
    assert figures["counts"].get("came back later and got in", 0) > 0, figures


def test_nobody_ends_otherwise(figures):
    counts = figures["counts"]
    assert not [what for what in counts if "failed" in what and "200" not in what and "504" not in what]
    late = sum(number for what, number in counts.items() if what.startswith("late or failed"))
    assert counts["in time"] + late == figures["taken"]


def test_memory_does_not_grow(figures):
    for name, mb in figures["resident_mb"].items():
        assert mb["late"] < mb["early"] * 1.15 + 4, (name, mb)
