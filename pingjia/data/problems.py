"""How a complaint about user data looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One complaint. Line 0 is the file as a whole. `str` gives FILE:LINE: field: reason.

    `rule` is a stable short name for what was found ("refusal", "near_duplicate"), where the reason has numbers in it.
    """

    file: str
    line: int
    field: str
    reason: str
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has against a row that it was handed without its place. `rule` as in `Problem`."""

    rule: str
    field: str
    reason: str


OnProblem = Callable[[Problem], None]
