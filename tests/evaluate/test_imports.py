"""What loading the room costs: a recipe must not load numpy, and nothing may load torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_settings_are_light() -> None:
    heavy = {"torch", "numpy", "jieba", "matplotlib", "httpx", "transformers"}
    assert not heavy & loaded_by("import pingjia.evaluate.settings; from pingjia.evaluate import EvalSettings")


def test_nothing_loads_torch_or_draws_before_it_must() -> None:
    names = "evaluate, compare, save_comparison, Endpoint, EvalReport"
    found = loaded_by(f"from pingjia.evaluate import {names}")
    assert "numpy" in found
    assert not {"torch", "transformers", "matplotlib", "jieba"} & found


def test_every_public_name_is_there_and_others_are_not() -> None:
    import pingjia.evaluate as room

    assert all(getattr(room, name) is not None for name in room.__all__)
    assert callable(room.compare)
    assert callable(room.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = room.nothing
