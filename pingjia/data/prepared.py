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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pingjia import chat
from pingjia.data.augment import AugmentCounts, Filters, Maker, augment, question
from pingjia.data.domains import DomainRules, cluster, load_rules
from pingjia.data.duplicates import text_digest
from pingjia.data.files import fingerprint
from pingjia.data.histogram import Histogram
from pingjia.data.intake import belongs, digest, made_chunks, open_work, store, take_in
from pingjia.data.layouts import parse_row
from pingjia.data.pairs import find_repeats
from pingjia.data.parts import Line, Parts, dump
from pingjia.data.pool import Pool
from pingjia.data.problems import Finding, Problem
from pingjia.data.quality import Comparison, Familiarity, Pair, judge_pairs
from pingjia.data.record import Plan
from pingjia.data.report import DataReport, Scores, load_report
from pingjia.data.report_page import render_page
from pingjia.data.settings import BackTranslationSettings, DataSettings, PrepareSettings
from pingjia.data.shares import DomainPlan, plan_domains
from pingjia.data.synonyms import Synonyms
from pingjia.data.table import Table, assemble
from pingjia.data.tally import Tally, empty_report
from pingjia.data.verdicts import KEPT, Verdicts, apply_domains, finding_of, judge_duplicates, judge_share
from pingjia.errors import DataError, StorageError
from pingjia.similarity import TextEncoder
from pingjia.types import Example

TRAIN, REJECTED, CHANGED = "train.jsonl", "rejected.jsonl", "changed.jsonl"
REPORT, PAGE = "report.json", "report.html"
OUTPUTS = (TRAIN, REJECTED, CHANGED, PAGE, REPORT)
WORK = ".work"
_MANY_ROUNDS = 8
_MANY_SHOWN = 200


class Tools:
    """The networks that a job may need, by name. This one has none; the command line brings real ones."""

    def encoder(self, name: str, layer: int | None) -> TextEncoder:
        raise DataError(f"prepare.quality needs the encoder {name!r}, and none can be loaded here")

    def back_translation(self, settings: BackTranslationSettings) -> Maker:
        raise DataError("prepare.augment.back_translation needs translators, and none can be loaded here")


@dataclass(frozen=True, slots=True)
class Job:
    """One preparation. `model`: whose tokenizer counts lengths. `on_rows(n)`: n more rows of the files are judged."""

    data: DataSettings
    settings: PrepareSettings
    model: str
    out: Path
    tools: Tools = field(default_factory=Tools)
    on_stage: Callable[[str], None] = lambda name: None
    on_rows: Callable[[int], None] = lambda count: None


@dataclass(slots=True)
class Prepared:
    """What came of a job. `was_finished`: an earlier call had done it all."""

    report: DataReport
    was_finished: bool = False


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
        self._tokenizer = chat.load_tokenizer(job.model)
        self._originals: dict[str, str] = {}
        self._encoder_loaded: TextEncoder | None = None
        self._familiarity = Familiarity()

    def run(self) -> Prepared:
        started = time.perf_counter()
        inputs = self._inputs()
        if (finished := self._finished(inputs)) is not None:
            return Prepared(finished, was_finished=True)
        open_work(self._work, inputs)
        self._load_tools()
        self._tally = Tally(empty_report(self._job.data, self._settings, self._job.model, digest(inputs)))
        self._read()
        table = assemble([self._rows], self._work / "table")
        held_out = assemble([self._held_out], self._work / "held_out_table")
        verdicts = Verdicts.of(table)
        self._tally.stage("read", len(table), len(table))
        self._tally.report.num_rows = len(table)
        with self._stage("rows", verdicts, num_in=len(table)):
            pass  # every row was judged as it was read
        with self._stage("duplicates", verdicts):
            judge_duplicates(table, verdicts, held_out, self._settings.duplicates)
        with self._stage("quality", verdicts, shown=self._compares()):
            self._judge_quality(verdicts)
        table, verdicts = self._augment(table, verdicts, held_out)
        if (note := self._familiarity.note(self._settings.quality.encoder)) is not None:
            self._tally.report.notes.append(note)
        self._group(table, verdicts)
        with self._stage("shares", verdicts):
            self._balance(table, verdicts)
        self._tally.columns(table, verdicts)
        self._write(table, held_out, verdicts, started)
        shutil.rmtree(self._work, ignore_errors=True)
        return Prepared(self._tally.report)

    def _finished(self, inputs: dict[str, Any]) -> DataReport | None:
        """The report, if `out` holds the result of this very job. DataError when it holds anything else."""
        out = self._job.out
        report = load_report(out / REPORT)
        if report is not None and report.inputs == digest(inputs) and (out / TRAIN).is_file():
            return report
        there = [name for name in OUTPUTS if (out / name).exists()]
        if there and not belongs(self._work, inputs):  # of this job they are half of a result: a kill while renaming
            raise DataError(
                f"{out / there[0]} exists already and is not the result of these inputs; choose another directory, or "
                "remove it first"
            )
        return None

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
            "template": self._tokenizer.template_digest,
            "model": job.model,
        }

    @contextmanager
    def _stage(self, name: str, verdicts: Verdicts, *, num_in: int | None = None, shown: bool = True) -> Iterator[None]:
        """Tell that a stage begins, and note how many records it left."""
        before = int(verdicts.alive().sum()) if num_in is None else num_in
        if shown:
            self._job.on_stage(name)
        yield
        if shown:
            self._tally.stage(name, before, int(verdicts.alive().sum()))

    # ---- reading

    def _read(self) -> None:
        job = self._job
        pool = self._pool()
        job.on_stage("read")
        take_in(
            job.data.dataset, self._plan(job.data.domains), pool, self._rows, on_rows=job.on_rows, on_note=self._note
        )
        if job.data.eval_dataset:
            held_out = self._plan(None, lenient=True)
            take_in(job.data.eval_dataset, held_out, pool, self._held_out, on_rows=job.on_rows, on_note=self._note)

    def _pool(self) -> Pool:
        return Pool(self._settings.engine, self._settings.processes, self._work / "staging")

    def _plan(self, domains: list[str] | None, *, lenient: bool = False) -> Plan:
        """`lenient`: for held-out rows, which are only compared with: none is left out for what it says."""
        settings, rules = self._settings, self._settings.domains.rules
        loaded: DomainRules | None = load_rules(rules) if rules else None
        names = tuple(domains) if domains is not None else None
        return Plan(self._job.model, self._job.data.cutoff_len, settings, names, loaded, lenient)

    def _note(self, problem: Problem) -> None:
        self._tally.report.notes.append(str(problem))

    def _alive(self, verdicts: Verdicts) -> Iterator[tuple[int, Example]]:
        """(number, example) of every record of the files that is kept so far."""
        for row, line in enumerate(self._rows.all_lines()):
            if verdicts.code[row] == KEPT and isinstance(line.row, dict):
                example = parse_row(line.row, line.where).example
                assert example is not None
                yield row, example

    # ---- quality

    def _compares(self) -> bool:
        return self._settings.quality.reference is not None or self._settings.quality.relevance is not None

    def _load_tools(self) -> None:
        """What later stages need, now: a directory that is not there is better known before hours of reading."""
        settings = self._settings
        self._makers = self._load_makers()
        judges_made = bool(self._makers) and settings.quality.augmented is not None
        if self._compares() or judges_made or settings.domains.clusters is not None:
            quality = settings.quality
            self._encoder_loaded = self._job.tools.encoder(quality.encoder, quality.layer)

    def _encoder(self) -> TextEncoder:
        assert self._encoder_loaded is not None
        return self._encoder_loaded

    def _judge_quality(self, verdicts: Verdicts) -> None:
        quality = self._settings.quality
        if quality.reference is not None:
            pairs = (Pair(r, e.response, e.reference) for r, e in self._alive(verdicts) if e.reference is not None)
            self._compare("reference", pairs, quality.reference, verdicts)
        if quality.relevance is not None:
            pairs = (Pair(r, e.response, e.messages[-2].content) for r, e in self._alive(verdicts))
            self._compare("relevance", pairs, quality.relevance, verdicts)

    def _compare(self, name: Comparison, pairs: Iterator[Pair], threshold: float, verdicts: Verdicts) -> None:
        scores = Scores(threshold, Histogram.even(0, 1, 50))
        below: dict[int, Finding] = {}  # no verdict before the last score: `_alive` must not see a row vanish
        for one in judge_pairs(pairs, self._encoder(), name, threshold):
            self._familiarity.add(one)
            scores.histogram.add([one.f1])
            if one.finding is not None:
                below[one.row] = one.finding
        scores.num_below = len(below)
        for row, finding in below.items():
            verdicts.reject_for(row, finding)
        self._tally.report.quality[name] = scores

    # ---- augmentation

    def _augment(self, table: Table, verdicts: Verdicts, held_out: Table) -> tuple[Table, Verdicts]:
        """Make rows from the kept ones; they pass the same checks. The table with them, and the longer verdicts."""
        settings = self._settings.augment
        makers = self._makers
        if not makers:
            return table, verdicts
        self._job.on_stage("augment")
        counts = AugmentCounts()
        made = augment(
            self._remembered(verdicts),
            settings,
            makers,
            self._settings.seed,
            filters=self._filters(held_out),
            counts=counts,
        )
        store(made_chunks(self._shown(made)), self._plan(None), Pool(), self._made, on_rows=lambda count: None)
        longer = assemble([self._rows, self._made], self._work / "table")
        grown = verdicts.grown(longer)
        before = int(verdicts.alive().sum())
        judge_duplicates(longer, grown, held_out, self._settings.duplicates, first=len(table))
        self._tally.augmented(counts, int(grown.alive()[len(table) :].sum()))
        self._tally.stage("augment", before, int(grown.alive().sum()))
        return longer, grown

    def _load_makers(self) -> dict[str, Maker]:
        augment, makers = self._settings.augment, dict[str, Maker]()
        if augment.synonyms.ratio > 0:
            makers["synonyms"] = Synonyms(augment.synonyms.replace, augment.synonyms.thesaurus)
        if augment.back_translation.ratio > 0:
            makers["back_translation"] = self._job.tools.back_translation(augment.back_translation)
        return makers

    def _filters(self, held_out: Table) -> Filters:
        questions = np.sort(held_out.signatures.question[:])
        threshold = self._settings.quality.augmented
        similarity = self._similarity(threshold) if threshold is not None else None
        return Filters(lambda text: _is_in(text_digest(text), questions), similarity, threshold)

    def _similarity(self, threshold: float) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
        scores = Scores(threshold, Histogram.even(0, 1, 50))
        self._tally.report.quality["augmented"] = scores
        encoder = self._encoder()

        def similarity(pairs: Sequence[tuple[str, str]]) -> list[float]:
            judged = judge_pairs(
                (Pair(i, new, old) for i, (new, old) in enumerate(pairs)), encoder, "augmented", threshold
            )
            found = []
            for one in judged:
                self._familiarity.add(one)
                found.append(one.f1)
            scores.histogram.add(found)
            scores.num_below += sum(f1 < threshold for f1 in found)
            return found

        return similarity

    def _remembered(self, verdicts: Verdicts) -> Iterator[Example]:
        """The kept examples; the questions of the first are remembered, to be shown beside what is made of them."""
        for _, example in self._alive(verdicts):
            if len(self._originals) < _MANY_SHOWN:
                self._originals[example.where] = question(example)
            yield example

    def _shown(self, made: Iterator[Example]) -> Iterator[Example]:
        """Pass made rows on, and show the first of them in the report."""
        for example in made:
            if example.augmented_from in self._originals:
                self._tally.made(self._originals[example.augmented_from], question(example))
            yield example

    # ---- domains and shares

    def _group(self, table: Table, verdicts: Verdicts) -> None:
        """Domains by meaning for the kept records that have none."""
        num_clusters = self._settings.domains.clusters
        rows = np.flatnonzero(verdicts.alive() & (table.domain_R == 0))
        if num_clusters is None or not len(rows):
            return
        self._job.on_stage("domains")
        wanted = np.zeros(len(table), bool)
        wanted[rows] = True

        def texts() -> Iterator[str]:
            for row, line in enumerate(self._lines()):
                if wanted[row] and isinstance(line.row, dict):
                    example = parse_row(line.row, line.where).example
                    assert example is not None
                    yield question(example)

        found = cluster(texts, len(rows), self._encoder().sentence_vectors, num_clusters, self._settings.seed)
        first = len(table.domains)
        table.domains.extend(found.names)
        table.domain_R[rows] = first + found.label
        self._grouped_from = first

    _grouped_from: int | None = None

    def _balance(self, table: Table, verdicts: Verdicts) -> None:
        """Language share and domain shares, in turns until both hold: each moves the other."""
        wanted, has_domains = self._settings.domains, False
        for _ in range(_MANY_ROUNDS):
            share = judge_share(table, verdicts, self._settings.languages)
            if wanted.target is None or (has_domains and not (share and share.num_dropped)):
                return
            rows = np.flatnonzero(verdicts.alive())
            plan = plan_domains(
                table.domain_names()[rows].tolist(),
                wanted.target,
                wanted.method,
                max_repeat=wanted.max_repeat,
                seed=self._settings.seed,
            )
            if not plan.is_reached:
                self._tally.report.notes.append(_not_reached(plan, wanted.max_repeat))
            has_domains = True
            apply_domains(rows, verdicts, plan)
        raise DataError("min_zh_share and domains.target cannot both be met by leaving rows out; ease one of them")

    # ---- writing

    def _write(self, table: Table, held_out: Table, verdicts: Verdicts, started: float) -> None:
        self._job.on_stage("write")
        out, report = self._job.out, self._tally.report
        report.repeats = find_repeats(verdicts, self._lines, self._held_out.all_lines)
        try:
            with ExitStack() as stack:
                files = {n: stack.enter_context(open(self._work / n, "wb")) for n in (TRAIN, REJECTED, CHANGED)}
                for row, line in enumerate(self._lines()):
                    self._write_row(row, line, files, table, held_out, verdicts)
            report.seconds = round(time.perf_counter() - started, 3)
            (self._work / PAGE).write_text(render_page(report), encoding="utf-8")
            (self._work / REPORT).write_text(json.dumps(report.to_dict(), ensure_ascii=False), encoding="utf-8")
            for name in OUTPUTS:  # the report, which says that all is done, last
                os.replace(self._work / name, out / name)
        except OSError as e:
            raise StorageError(f"{out}: the rows could not be written: {e.strerror or e}") from None

    def _lines(self) -> Iterator[Line]:
        yield from self._rows.all_lines()
        yield from self._made.all_lines()

    def _write_row(
        self, row: int, line: Line, files: Mapping[str, BinaryIO], table: Table, held_out: Table, verdicts: Verdicts
    ) -> None:
        self._tally.personal(line)
        finding = finding_of(row, verdicts, table, held_out)
        faults = line.faults or ((finding,) if finding is not None else ())
        if faults:
            self._tally.reject(line, faults[0])
            if faults[0].rule != "other_domain":
                files[REJECTED].write(_rejected(line, faults))
            return
        times = int(verdicts.times[row])
        files[TRAIN].write(dump(self._value(row, line, table, verdicts)) * times)
        self._tally.keep(line, times)
        self._tally.example(line, self._tokenizer)
        if line.changes:
            changes = [f"{f.field}: {f.reason}" for f in line.changes]
            files[CHANGED].write(dump({"where": line.where, "changes": changes, "row": line.original}))

    def _value(self, row: int, line: Line, table: Table, verdicts: Verdicts) -> dict[str, Any]:
        """The row to train on, with its weight and the domain it was grouped into."""
        assert isinstance(line.row, dict)
        value, weight, domain = line.row, float(verdicts.weight[row]), int(table.domain_R[row])
        if weight != 1:
            value = {**value, "weight": round(weight * float(value.get("weight", 1)), 6)}
        if self._grouped_from is not None and domain >= self._grouped_from:
            value = {**value, "domain": table.domains[domain]}
        return value


def _rejected(line: Line, faults: Sequence[Finding]) -> bytes:
    row = line.row if line.original is None else line.original
    reasons = [f"{f.field}: {f.reason}" for f in faults]
    return dump({"where": line.where, "rules": [f.rule for f in faults], "reasons": reasons, "row": row})


def _is_in(value: int, ordered: np.ndarray) -> bool:
    at = int(np.searchsorted(ordered, np.uint64(value)))
    return at < len(ordered) and int(ordered[at]) == value


def _not_reached(plan: DomainPlan, max_repeat: int) -> str:
    short = [row for row in plan.table if row.share_after < row.share_wanted]
    told = ", ".join(f"{row.name} {row.share_after:.1%} of {row.share_wanted:.1%}" for row in short[:5])
    return f"domains below their shares, with max_repeat {max_repeat}: {told}"
