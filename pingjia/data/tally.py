"""Counting what the report shows, while the rows are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.augment import AugmentCounts
from pingjia.data.columns import chunks
from pingjia.data.encode import encode_example
from pingjia.data.files import resolve
from pingjia.data.histogram import Histogram
from pingjia.data.layouts import parse_row
from pingjia.data.parts import Line
from pingjia.data.personal import mask, mask_row
from pingjia.data.problems import Finding, Problem
from pingjia.data.rendered import render_example
from pingjia.data.report import MAX_SAMPLES, DataReport, Rule, Sample, Share, Stage, shorten
from pingjia.data.settings import DataSettings, PrepareSettings
from pingjia.data.table import Table
from pingjia.data.verdicts import KEPT, Verdicts, letters_of

_NUM_EXAMPLES = 3


def empty_report(data: DataSettings, settings: PrepareSettings, model: str, inputs: str) -> DataReport:
    """A report that knows what is asked for, and nothing yet of what came of it."""
    names = [*data.dataset, *data.eval_dataset]
    return DataReport(
        title=", ".join(name.rsplit("/", 1)[-1] for name in data.dataset),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=[(name, resolve(name).stat().st_size) for name in names],
        model=model,
        cutoff_len=data.cutoff_len,
        settings=settings.model_dump(mode="json"),
        min_zh_share=settings.languages.min_zh_share,
        inputs=inputs,
    )


class Tally:
    """Adds what happens to a report."""

    def __init__(self, report: DataReport) -> None:
        self.report = report

    # ---- one record at a time

    def reject(self, line: Line, finding: Finding) -> None:
        if finding.rule == "other_domain":
            self.report.num_other_domains += 1
            return
        self.report.num_rejected += 1
        _add(self.report.rejects, line, finding)

    def keep(self, line: Line, times: int) -> None:
        report = self.report
        report.num_kept += 1
        report.num_written += times
        report.num_changed += bool(line.changes)
        for finding in line.changes:
            _add(report.changes, line, finding)

    def personal(self, line: Line) -> None:
        for kind, count in line.personal.items():
            self.report.personal[kind] = self.report.personal.get(kind, 0) + count

    def made(self, old: str, new: str) -> None:
        """Show a made question beside the one it was made from, for the first few."""
        if len(self.report.made_samples) < MAX_SAMPLES:
            self.report.made_samples.append((mask(old)[0], mask(new)[0]))

    def augmented(self, counts: AugmentCounts, num_kept: int) -> None:
        self.report.num_made = num_kept
        self.report.made = dict(counts.made)
        for maker, refused in counts.refused.items():
            for rule, count in refused.items():
                self.report.refused[f"{maker}: {rule}"] = count

    # ---- all records at once

    def stage(self, name: str, num_in: int, num_out: int) -> None:
        self.report.stages.append(Stage(name, num_in, num_out))

    def columns(self, table: Table, verdicts: Verdicts) -> None:
        """Lengths, languages, domains and the share of Chinese, before and after."""
        report, times = self.report, np.where(verdicts.alive(), verdicts.times, 0)
        has_text = np.zeros(len(table), bool)
        report.lengths = Histogram.whole(report.cutoff_len)
        languages, domains = _Shares(), _Shares()
        for chunk in chunks(len(table)):
            chars = table.columns["chars"][chunk].astype(np.int64)
            has_text[chunk] = chars > 0
            report.lengths.add(table.columns["tokens"][chunk][verdicts.code[chunk] == KEPT])
            languages.add(table.columns["lang"][chunk], chars, times[chunk], np.ones(len(chars), np.float32))
            domains.add(table.domain_R[chunk], chars, times[chunk], verdicts.weight[chunk])
        report.zh_before = _zh_share(*letters_of(table, has_text.astype(np.int32)))
        report.zh_after = _zh_share(*letters_of(table, times))
        report.languages = languages.named(lambda code: code.decode())
        report.domains = _with_wanted(domains.named(table.domains.__getitem__), report.settings["domains"]["target"])

    def example(self, line: Line, tokenizer: Tokenizer) -> None:
        """Show a kept row as the model reads it, if few are shown yet."""
        if len(self.report.examples) >= _NUM_EXAMPLES or not isinstance(line.row, dict):
            return
        example = parse_row(mask_row(line.row), line.where).example
        encoded = encode_example(example, tokenizer, None) if example is not None else None
        if encoded is not None and not isinstance(encoded, Problem):
            self.report.examples.append(render_example(encoded, tokenizer))


def _add(rules: dict[str, Rule], line: Line, finding: Finding) -> None:
    rule = rules.setdefault(finding.rule, Rule())
    if len(rule.samples) < MAX_SAMPLES:
        rule.add(Sample(line.where, mask(f"{finding.field}: {finding.reason}")[0], shorten(mask(_text(line))[0])))
    else:
        rule.count += 1


def _text(line: Line) -> str:
    row: Any = line.row if line.original is None else line.original
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair can be in it


def _zh_share(num_han: int, num_letters: int) -> float | None:
    return num_han / num_letters if num_letters else None


class _Shares:
    """A row of the report for each language, or each domain. Records without text count nowhere: nothing could be read
    of them."""

    def __init__(self) -> None:
        self._rows: dict[Any, Share] = {}

    def add(self, label: np.ndarray, chars: np.ndarray, times: np.ndarray, weight: np.ndarray) -> None:
        """A chunk of records; `label` is the code or number of what each belongs to."""
        for key in np.unique(label[chars > 0]).tolist():
            mine = (label == key) & (chars > 0)
            before = self._rows.get(key) or Share("", 0, 0, 1.0, 0, 0)
            weights = weight[mine][times[mine] > 0]
            self._rows[key] = replace(
                before,
                num_before=before.num_before + int(mine.sum()),
                num_after=before.num_after + int(times[mine].sum()),
                weight=round(float(weights[0]), 6) if len(weights) else before.weight,
                chars_before=before.chars_before + int(chars[mine].sum()),
                chars_after=before.chars_after + int((chars * times)[mine].sum()),
            )

    def named(self, name: Callable[[Any], str]) -> list[Share]:
        """The rows, the largest first."""
        rows = (replace(self._rows[key], name=name(key)) for key in sorted(self._rows))
        return sorted(rows, key=lambda share: -share.num_before)


def _with_wanted(shares: list[Share], target: str | dict[str, float] | None) -> list[Share]:
    """The shares that were asked for, beside those that came of it."""
    if target is None:
        return shares
    there = sum(s.num_after > 0 for s in shares) or 1
    wanted = target if isinstance(target, dict) else {s.name: 1 / there for s in shares if s.num_after}
    return [replace(s, wanted=wanted.get(s.name, 0.0)) for s in shares]
