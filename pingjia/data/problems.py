"""How a complaint about user data looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One complaint. Line 0 is the file as a whole. `str` gives FILE:LINE: field: reason."""

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.reason}"


OnProblem = Callable[[Problem], None]
