"""The examples of docs/engine.md run, on a tiny network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pingjia.engine import Engine
from pingjia.types import Message, Sampling

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


def test_the_examples_of_event_loops_and_grammars_run(tiny_engine: Callable[..., Engine]) -> None:
    names = {"engine": tiny_engine(), "Sampling": Sampling, "Message": Message}
    exec(block_with("asyncio.run"), names)
    exec(block_with("Grammar.schema"), names)
    assert names["answer"].finish_reason in ("stop", "length")
    assert not names["engine"].has_work()
