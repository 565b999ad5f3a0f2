"""The files of a run as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pingjia import data
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError
from pingjia.tune.guards import require_learnt
from pingjia.types import Encoded


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set as token ids. `dropped`: a line for each row that is left out; `has_tools`: whether any row has."""

    encoded: list[Encoded]
    dropped: list[str]
    has_tools: bool


def encode_rows(files: list[str], settings: DataSettings, tokenizer: Any, cutoff_len: int) -> Rows:
    """Rows as token ids. An unreadable row stops the run; a row over cutoff_len is dropped, by name, never cut."""
    problems: list[str] = []
    examples = list(
        data.read_examples(
            files,
            domains=settings.domains,
            max_samples=settings.max_samples,
            on_problem=lambda p: problems.append(str(p)),
        )
    )
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            "\n".join(problems[:10]) + more + f"\n{len(problems)} rows cannot be trained on; correct them, or let "
            "`pingjia data prepare` write a clean file and rejected.jsonl"
        )
    rows, too_long = data.encode_examples(examples, tokenizer, cutoff_len)
    require_learnt(rows)
    return Rows(rows, [str(problem) for problem in too_long], any(example.tools for example in examples))
