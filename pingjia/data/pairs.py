"""Showing what repeats what: the first few records that were left out for saying what another one says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pingjia.data.parts import Line
from pingjia.data.personal import mask
from pingjia.data.report import MAX_SAMPLES, Repeat, shorten
from pingjia.data.verdicts import EXACT, LEAK_NEAR, LEAK_QUESTION, LEAK_ROW, NEAR, RULES, Verdicts

Lines = Callable[[], Iterable[Line]]


def find_repeats(verdicts: Verdicts, lines: Lines, held_out_lines: Lines) -> list[Repeat]:
    """Up to MAX_SAMPLES pairs of each rule, as they are read, personal data masked. Reads the rows once, and no further
    than the last record that is shown."""
    found = [(row, int(verdicts.other[row])) for code in (NEAR, EXACT, *_LEAKS) for row in _first(verdicts.code, code)]
    leaked = {row for row, _ in found if verdicts.code[row] in _LEAKS}
    shown = _texts(lines(), {n for row, other in found for n in ((row,) if row in leaked else (row, other))})
    held_out = _texts(held_out_lines(), {other for row, other in found if row in leaked})
    return [
        Repeat(RULES[verdicts.code[row]], *shown[row], *(held_out if row in leaked else shown)[other])
        for row, other in found
    ]


_LEAKS = (LEAK_NEAR, LEAK_QUESTION, LEAK_ROW)


def _first(code_R: np.ndarray, code: int) -> Iterator[int]:
    """The first records of a code. Looks at the whole column, which is one byte a record."""
    return map(int, np.flatnonzero(code_R == code)[:MAX_SAMPLES])


def _texts(lines: Iterable[Line], wanted: set[int]) -> Mapping[int, tuple[str, str]]:
    """(place, text) of the records of these numbers."""
    found: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(lines if wanted else ()):
        if number in wanted:
            found[number] = (line.where, shorten(mask(_said(line.row))[0]))
            if len(found) == len(wanted):
                break
    return found


def _said(row: dict[str, Any] | str) -> str:
    """The strings of a row without its keys: that is what is compared."""
    return row if isinstance(row, str) else " ⏎ ".join(filter(None, _strings(row)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
