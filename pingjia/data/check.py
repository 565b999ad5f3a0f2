"""Everything that can be known about data files before training: problems by line, counts, lengths, share of Chinese.

Not here: printing (`cli/`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.encode import encode_example
from pingjia.data.personal import find_personal
from pingjia.data.problems import Problem
from pingjia.data.read import Reader
from pingjia.data.rules import check_rules
from pingjia.data.seen import Seen
from pingjia.language import identify
from pingjia.script import count_han, count_letters
from pingjia.types import Example

MAX_KEPT = 10_000  # problems kept in a report; all are counted
_NUM_LONGEST = 5
_NUM_SAMPLES = 5  # of each rule


@dataclass(frozen=True, slots=True)
class Lengths:
    """Quantiles of lengths: tokens when a tokenizer was given, else characters."""

    unit: str
    p50: int
    p90: int
    p99: int
    longest: int
    total: int


@dataclass(slots=True)
class CheckReport:
    """What `check_files` found.

    `problems` (the first MAX_KEPT of `num_problems`) are rows or files that would not be trained on; `notes` are
    remarks about rows that would. `num_rows` = rows met, `num_examples` = those that are sound. `zh_share`: Chinese
    characters among the letters of all questions and answers, None without letters; `script.py` has the definition.
    `longest`: (where, length) of the longest examples. `rules`: how many problems and notes each rule has made, and
    `samples` the first of them.
    """

    files: tuple[str, ...]
    num_rows: int = 0
    num_examples: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    num_notes: int = 0
    notes: list[Problem] = field(default_factory=list)
    zh_share: float | None = None
    num_chars: int = 0
    domains: dict[str, int] = field(default_factory=dict)
    langs: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    lengths: Lengths | None = None
    longest: list[tuple[str, int]] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no problem. Notes do not count."""
        return self.num_problems == 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ok": self.ok, **asdict(self), "files": list(self.files)}


def check_files(
    files: Iterable[str | Path],
    tokenizer: Tokenizer | None = None,
    cutoff_len: int | None = None,
    *,
    domains: Collection[str] | None = None,
    content: bool = False,
) -> CheckReport:
    """Read and check `files` as training would. Memory: 16 bytes per row, 33 at the end, besides the problems kept.

    With a tokenizer, lengths are in tokens and a row over `cutoff_len` is a problem. With `domains`, rows of other
    domains are still checked but not counted as examples. With `content`, so is what a row says, by the rules of
    `rules.py` (problems), and personal data is noted; languages are then told from the texts.
    Raises DataError for a `samples:` name that is not packaged, ModelError when the tokenizer's template is unfit for
    training.
    """
    check = _Check(tuple(map(str, files)), tokenizer, cutoff_len, content)
    reader = Reader(check.problem, check.note)
    for example, layout in reader.read(check.report.files):
        if domains is None or example.domain in domains:
            check.example(example, layout)
    check.report.num_rows = reader.num_rows
    return check.finish()


class _Check:
    """The report while it grows."""

    def __init__(
        self, files: tuple[str, ...], tokenizer: Tokenizer | None, cutoff_len: int | None, content: bool
    ) -> None:
        self.report = CheckReport(files)
        self._content = content
        self._tokenizer = tokenizer
        self._cutoff_len = cutoff_len
        self._lengths = Counter[int]()
        self._longest: list[tuple[int, str]] = []
        self._seen = Seen()
        self._counts = {"domains": Counter[str](), "langs": Counter[str](), "layouts": Counter[str]()}
        self._num_han = self._num_letters = 0

    def problem(self, problem: Problem) -> None:
        self.report.num_problems += 1
        self._count_rule(problem)
        if len(self.report.problems) < MAX_KEPT:
            self.report.problems.append(problem)

    def note(self, note: Problem) -> None:
        self.report.num_notes += 1
        self._count_rule(note)
        if len(self.report.notes) < MAX_KEPT:
            self.report.notes.append(note)

    def _count_rule(self, problem: Problem) -> None:
        if not problem.rule:
            return
        self.report.rules[problem.rule] = self.report.rules.get(problem.rule, 0) + 1
        samples = self.report.samples.setdefault(problem.rule, [])
        if len(samples) < _NUM_SAMPLES:
            samples.append(problem)

    def example(self, example: Example, layout: str) -> None:
        size = self._measure(example)
        if size is None or (self._content and not self._says_well(example)):
            return
        self.report.num_examples += 1
        self._lengths[size] += 1
        heapq.heappush(self._longest, (size, example.where))
        if len(self._longest) > _NUM_LONGEST:
            heapq.heappop(self._longest)
        lang = self._language(example) if self._content else example.lang
        for name, value in (("domains", example.domain), ("langs", lang), ("layouts", layout)):
            self._counts[name][value or "-"] += 1
        self._count_characters(example)
        self._seen.add(example)

    def _measure(self, example: Example) -> int | None:
        """Length of an example; None when it has become a problem."""
        if self._tokenizer is None:
            return sum(len(m.text) for m in example.messages)
        encoded = encode_example(example, self._tokenizer, self._cutoff_len)
        if isinstance(encoded, Problem):
            self.problem(encoded)
            return None
        return len(encoded.ids)

    def _says_well(self, example: Example) -> bool:
        """Whether no rule has anything against what the row says. Personal data is only noted."""
        file, _, line = example.where.rpartition(":")
        kinds = Counter(p.kind for m in example.messages for p in find_personal(m.text))
        for kind, count in kinds.items():
            reason = f"personal data: {kind}, {count} times; `data prepare` masks it with personal.action=mask"
            self.note(Problem(file, int(line), "messages", reason, f"personal.{kind}"))
        findings = check_rules(example)
        for finding in findings:
            self.problem(Problem(file, int(line), finding.field, finding.reason, finding.rule))
        return not findings

    def _language(self, example: Example) -> str:
        return identify("\n".join(m.text for m in example.messages if m.role in ("user", "assistant"))).lang

    def _count_characters(self, example: Example) -> None:
        for message in example.messages:
            if message.role in ("user", "assistant"):
                self.report.num_chars += len(message.text)
                self._num_han += count_han(message.text)
                self._num_letters += count_letters(message.text)

    def _note_repeats(self) -> None:
        for repeat in self._seen.repeats():
            file, _, line = repeat.where.rpartition(":")
            reason = f"the same question and answer as {repeat.first}; it is learnt twice"
            self.note(Problem(file, int(line), "row", reason, "duplicate"))
        order = {name: number for number, name in enumerate(self.report.files)}
        self.report.notes.sort(key=lambda note: (order.get(note.file, 0), note.line))

    def finish(self) -> CheckReport:
        self._note_repeats()
        report = self.report
        report.domains, report.langs, report.layouts = (
            dict(self._counts[name].most_common()) for name in ("domains", "langs", "layouts")
        )
        report.zh_share = self._num_han / self._num_letters if self._num_letters else None
        report.longest = [(where, size) for size, where in sorted(self._longest, reverse=True)]
        if self._lengths:
            report.lengths = _lengths(self._lengths, "tokens" if self._tokenizer else "characters")
        if not report.num_rows and not report.num_problems:
            self.problem(Problem(", ".join(report.files) or "-", 0, "files", "no row in them"))
        return report


def _lengths(counts: Mapping[int, int], unit: str) -> Lengths:
    """Quantiles from how often each length occurs."""
    ordered = sorted(counts)
    up_to = list(accumulate(counts[size] for size in ordered))
    num_rows = up_to[-1]

    def at(share: float) -> int:
        return ordered[bisect_right(up_to, min(num_rows - 1, int(share * num_rows)))]

    return Lengths(unit, at(0.5), at(0.9), at(0.99), ordered[-1], sum(n * size for size, n in counts.items()))
