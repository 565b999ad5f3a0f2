"""Which stages of a recipe are done already: a stage is done while its inputs are what they were.

Inputs are data, the parts of the recipe it reads, and the code of the rooms it runs through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pingjia
from pingjia.errors import StorageError

BASE = ("errors.py", "types.py", "recipe.py", "ledger.py", "locate.py", "remote.py", "similarity.py")


class Stages:
    """The stage records of one output_dir: stages/<name>.json with a digest of the inputs and what came of it."""

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir / "stages"

    def result(self, name: str, inputs: str) -> Any | None:
        """What the stage came to, if it is done and its inputs are unchanged."""
        try:
            record = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record.get("result") if record.get("inputs") == inputs else None

    def finish(self, name: str, inputs: str, result: Any) -> None:
        """Note that a stage is done. Raises StorageError when the disk refuses."""
        file = self._folder / f"{name}.json"
        temporary = file.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(
                json.dumps({"inputs": inputs, "result": result}, ensure_ascii=False, indent=1), encoding="utf-8"
            )
            temporary.replace(file)
        except OSError as e:
            raise StorageError(
                f"{file}: not written ({e.strerror}); make room and run the same command again"
            ) from None


def digest(rooms: Sequence[str], *parts: Any) -> str:
    """sha256 over the source files of `rooms` (and the base) and over `parts` as JSON."""
    total = hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode())
    root = Path(pingjia.__file__).parent
    for file in [root / name for name in BASE] + [f for room in rooms for f in sorted((root / room).rglob("*.py"))]:
        total.update(file.read_bytes())
    return total.hexdigest()
