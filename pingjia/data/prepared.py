"""A data set as people have it -> one that a model should learn from, with a reason for every row that is left out.

`prepare` walks the stages in the order of `PrepareSettings`; each is a function of another file. What is written:

    train.jsonl     the rows to train on
    rejected.jsonl  every other row, as it stood in its file, with where and why
    changed.jsonl   rows of train.jsonl that differ from the file (masked, cut, split), as they stood there
    report.json, report.html

Work in progress lies in `.work`; a run that was killed goes on from it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pingjia import chat
from pingjia.data.domains import DomainRules, load_rules
from pingjia.data.files import fingerprint
from pingjia.data.intake import belongs, digest, open_work, take_in
from pingjia.data.parts import Line, Parts, dump
from pingjia.data.pool import Pool
from pingjia.data.problems import Finding, Problem
from pingjia.data.record import Plan
from pingjia.data.settings import DataSettings, PrepareSettings
from pingjia.data.shares import DomainPlan, SharePlan, plan_domains
from pingjia.data.table import Table, assemble
from pingjia.data.verdicts import (
    Verdicts,
    apply_domains,
    finding_of,
    judge_duplicates,
    judge_share,
)
from pingjia.errors import DataError, StorageError

TRAIN, REJECTED, CHANGED = "train.jsonl", "rejected.jsonl", "changed.jsonl"
REPORT, PAGE = "report.json", "report.html"
OUTPUTS = (TRAIN, REJECTED, CHANGED, PAGE, REPORT)
WORK = ".work"
_MANY_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """One preparation. `model`: whose tokenizer counts lengths. `on_rows(n)`: n more rows of the files are judged."""

    data: DataSettings
    settings: PrepareSettings
    model: str
    out: Path
    on_stage: Callable[[str], None] = lambda name: None
    on_rows: Callable[[int], None] = lambda count: None


@dataclass(slots=True)
class Prepared:
    """What became of the rows. `reasons` counts records that are left out, by rule."""

    num_rows: int = 0
    num_kept: int = 0
    num_written: int = 0
    num_rejected: int = 0
    num_changed: int = 0
    num_made: int = 0
    num_other_domains: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    personal: dict[str, int] = field(default_factory=dict)
    share: SharePlan | None = None
    domains: DomainPlan | None = None
    seconds: float = 0.0
    was_finished: bool = False


def read_report(out: Path) -> dict[str, Any] | None:
    """report.json of a prepared data set, or None."""
    try:
        report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def prepare(job: Job) -> Prepared:
    """Do the job; the files it reads stay as they are, and nothing that is in `out` already is overwritten.

    Raises DataError when a file cannot be read, `out` holds the result of another job, or a share is out of reach;
    StorageError when the disk refuses.
    """
    return _Preparation(job).run()


class _Preparation:
    """One job at work."""

    def __init__(self, job: Job) -> None:
        self._job, self._settings = job, job.settings
        self._work = job.out / WORK
        self._rows = Parts(self._work / "rows")
        self._made = Parts(self._work / "made")
        self._held_out = Parts(self._work / "held_out")
        self._result = Prepared()

    def run(self) -> Prepared:
        started = time.perf_counter()
        inputs = self._inputs()
        if self._is_finished(inputs):
            return Prepared(was_finished=True)
        open_work(self._work, inputs)
        self._read()
        table = assemble([self._rows], self._work / "table")
        held_out = assemble([self._held_out], self._work / "held_out_table")
        verdicts = Verdicts.of(table)
        self._judge(table, held_out, verdicts)
        self._balance(table, verdicts)
        self._write(table, held_out, verdicts)
        self._result.seconds = time.perf_counter() - started
        shutil.rmtree(self._work, ignore_errors=True)
        return self._result

    def _is_finished(self, inputs: dict[str, Any]) -> bool:
        """Whether `out` holds the result of this very job. DataError when it holds anything else by those names."""
        report = read_report(self._job.out)
        if report is not None and report.get("inputs") == digest(inputs):
            return True
        there = [name for name in OUTPUTS if (self._job.out / name).exists()]
        if there and not belongs(self._work, inputs):  # of this job they are half of a result: a kill while renaming
            raise DataError(
                f"{self._job.out / there[0]} exists already and is not the result of these inputs; choose another "
                "directory, or remove it first"
            )
        return False

    def _inputs(self) -> dict[str, Any]:
        """Everything that decides the result."""
        job = self._job
        files = [*job.data.dataset, *job.data.eval_dataset]
        rules = job.settings.domains.rules
        return {
            "files": [files, fingerprint(files)],
            "rules": fingerprint([rules]) if rules else None,
            "data": job.data.model_dump(mode="json"),
            "settings": job.settings.model_dump(mode="json", exclude={"engine", "processes"}),
            "template": chat.load_tokenizer(job.model).template_digest,
            "model": job.model,
        }

    # ---- reading

    def _read(self) -> None:
        job = self._job
        plan = self._plan(job.data.domains)
        pool = Pool(self._settings.engine, self._settings.processes, self._work / "staging")
        job.on_stage("read")
        take_in(job.data.dataset, plan, pool, self._rows, on_rows=job.on_rows, on_note=self._note)
        if job.data.eval_dataset:
            job.on_stage("held-out rows")
            held_out = self._plan(None, lenient=True)
            take_in(job.data.eval_dataset, held_out, pool, self._held_out, on_rows=job.on_rows, on_note=self._note)

    def _plan(self, domains: list[str] | None, *, lenient: bool = False) -> Plan:
        """`lenient`: for held-out rows, which are only compared with: none is left out for what it says."""
        settings, rules = self._settings, self._settings.domains.rules
        loaded: DomainRules | None = load_rules(rules) if rules else None
        names = tuple(domains) if domains is not None else None
        return Plan(self._job.model, self._job.data.cutoff_len, settings, names, loaded, lenient)

    def _note(self, problem: Problem) -> None:
        self._result.notes.append(str(problem))

    # ---- deciding

    def _judge(self, table: Table, held_out: Table, verdicts: Verdicts) -> None:
        self._job.on_stage("duplicates")
        judge_duplicates(table, verdicts, held_out, self._settings.duplicates)

    def _balance(self, table: Table, verdicts: Verdicts) -> None:
        """Language share and domain shares, in turns until both hold: each moves the other."""
        self._job.on_stage("shares")
        wanted = self._settings.domains
        for _ in range(_MANY_ROUNDS):
            share = judge_share(table, verdicts, self._settings.languages)
            self._result.share = self._result.share or share
            if wanted.target is None or (self._result.domains is not None and not (share and share.num_dropped)):
                return
            rows = np.flatnonzero(verdicts.alive())
            plan = plan_domains(
                table.domain_names()[rows].tolist(),
                wanted.target,
                wanted.method,
                max_repeat=wanted.max_repeat,
                seed=self._settings.seed,
            )
            self._result.domains = self._result.domains or plan
            apply_domains(rows, verdicts, plan)
        raise DataError("min_zh_share and domains.target cannot both be met by leaving rows out; ease one of them")

    # ---- writing

    def _write(self, table: Table, held_out: Table, verdicts: Verdicts) -> None:
        self._job.on_stage("write")
        out = self._job.out
        try:
            with ExitStack() as stack:
                files = {n: stack.enter_context(open(self._work / n, "wb")) for n in (TRAIN, REJECTED, CHANGED)}
                for row, line in enumerate(self._lines()):
                    self._write_row(row, line, files, table, held_out, verdicts)
            self._write_report(table, verdicts)
            for name in OUTPUTS:  # the report, which says that all is done, last
                os.replace(self._work / name, out / name)
        except OSError as e:
            raise StorageError(f"{out}: the rows could not be written: {e.strerror or e}") from None

    def _write_report(self, table: Table, verdicts: Verdicts) -> None:
        (self._work / REPORT).write_text(json.dumps({"inputs": digest(self._inputs())}), encoding="utf-8")
        (self._work / PAGE).write_text("", encoding="utf-8")

    def _lines(self) -> Iterator[Line]:
        yield from self._rows.all_lines()
        yield from self._made.all_lines()

    def _write_row(
        self, row: int, line: Line, files: Mapping[str, BinaryIO], table: Table, held_out: Table, verdicts: Verdicts
    ) -> None:
        result = self._result
        result.num_rows += 1
        for kind, count in line.personal.items():
            result.personal[kind] = result.personal.get(kind, 0) + count
        finding = finding_of(row, verdicts, table, held_out)
        faults = line.faults or ((finding,) if finding is not None else ())
        if faults:
            self._reject(line, faults, files[REJECTED])
            return
        result.num_kept += 1
        times, weight = int(verdicts.times[row]), float(verdicts.weight[row])
        value = line.row if weight == 1 else {**_row(line), "weight": round(weight, 6)}
        files[TRAIN].write(dump(value) * times)
        result.num_written += times
        if line.changes:
            result.num_changed += 1
            changes = [f"{f.field}: {f.reason}" for f in line.changes]
            files[CHANGED].write(dump({"where": line.where, "changes": changes, "row": line.original}))

    def _reject(self, line: Line, faults: tuple[Finding, ...], file: BinaryIO) -> None:
        result, rule = self._result, faults[0].rule
        if rule == "other_domain":
            result.num_other_domains += 1
            return
        result.num_rejected += 1
        result.reasons[rule] = result.reasons.get(rule, 0) + 1
        reasons = [f"{f.field}: {f.reason}" for f in faults]
        row = line.row if line.original is None else line.original
        file.write(dump({"where": line.where, "rules": [f.rule for f in faults], "reasons": reasons, "row": row}))


def _row(line: Line) -> dict[str, Any]:
    assert isinstance(line.row, dict)
    return line.row
