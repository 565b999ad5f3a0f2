"""`pingjia quality CANDIDATE --reference R --judge J`: X % of a reference assistant's dialogue quality, by judges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import console, errors, progress_bar
from pingjia.cli.sides import FORMS, check_side, generator_of
from pingjia.errors import UserError

if TYPE_CHECKING:
    from pingjia.evaluate import QualityReport
    from pingjia.evaluate.assessment import Side
    from pingjia.evaluate.dialogue import Dialogue, Question
    from pingjia.evaluate.judge import Judge

BELOW = 3  # exit code with --gate


def quality(
    candidate: Annotated[str, typer.Argument(help=f"What is judged: {FORMS}; or a .jsonl of its answers.")],
    reference: Annotated[str, typer.Option("--reference", help="What it is held against; the same forms.")],
    judge: Annotated[
        list[str], typer.Option("--judge", help="Who judges; the same forms. May be given several times.")
    ],
    questions: Annotated[str, typer.Option(help="A .jsonl of questions, or the packaged set.")] = "dialogue_80",
    out: Annotated[Path, typer.Option(help="Where answers, marks and reports go.")] = Path("quality"),
    threshold: Annotated[float, typer.Option(help="The share that passes.", min=0.01, max=2.0)] = 0.85,
    people: Annotated[str | None, typer.Option(help="A .jsonl of pairs that people have labelled.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer to one turn.", min=1)] = 1024,
    gate: Annotated[bool, typer.Option("--gate", help=f"Exit with {BELOW} unless the result is `passed`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """How good are its answers beside another assistant's? Judges mark both, 1 to 10, in both orders.

    The judges are checked too, with answers known to be bad, longer, or equal. Run again after a stop, it asks only for
    the marks that are missing.
    """
    from pingjia.evaluate import KeptMarks, assess, read_labelled, read_questions, save_quality
    from pingjia.evaluate.assessment import num_marks

    for side in (candidate, reference, *judge):
        check_side(side)
    asked = read_questions(questions)
    labelled = read_labelled(people) if people else []
    ours = _side(candidate, asked, max_tokens, out / "answers_candidate.jsonl")
    theirs = _side(reference, asked, max_tokens, out / "answers_reference.jsonl")
    with progress_bar(errors) as progress:

        def on_mark(name: str):  # type: ignore[no-untyped-def]
            task = progress.add_task(f"judge {name}", total=num_marks(len(asked), len(labelled)), note="")
            return lambda: progress.advance(task)

        kept = KeptMarks(out / "marks.jsonl")
        report = assess(ours, theirs, _judges(judge), threshold=threshold, people=labelled, kept=kept, on_mark=on_mark)
    save_quality(report, out)
    _print(report, out, as_json=as_json)
    if gate and report.verdict != "passed":
        raise typer.Exit(BELOW)


def _side(spec: str, questions: Sequence[Question], max_tokens: int, file: Path) -> Side:
    """A side's answers: read from a file of them, or asked for now and written beside the report."""
    from pingjia.evaluate import read_answers
    from pingjia.evaluate.assessment import Side
    from pingjia.evaluate.dialogue import answer_lines
    from pingjia.evaluate.store import write_whole

    if spec.endswith(".jsonl"):
        return Side(spec, read_answers(spec, questions))
    dialogues = _ask(spec, questions, max_tokens)
    write_whole(file, answer_lines(dialogues))
    return Side(spec, dialogues)


def _ask(spec: str, questions: Sequence[Question], max_tokens: int) -> list[Dialogue]:
    from pingjia.evaluate import ask
    from pingjia.types import Sampling

    generator = generator_of(spec)
    with progress_bar(errors) as progress:
        turns = sum(len(question.turns) for question in questions)
        task = progress.add_task(f"answers {spec}", total=turns, note="")
        return ask(
            questions, generator, Sampling(max_tokens=max_tokens, temperature=0.0), lambda: progress.advance(task)
        )


def _judges(specs: Sequence[str]) -> list[Judge]:
    from pingjia.evaluate.judge import Judge

    if len(set(specs)) < len(specs):
        raise UserError("--judge: the same judge twice would count its marks twice; name each once")
    return [Judge(spec.partition("?")[0], generator_of(spec)) for spec in specs]


def _print(report: QualityReport, out: Path, *, as_json: bool) -> None:
    from rich.table import Table

    from pingjia.evaluate import quality_page as page

    if as_json:
        console.print_json(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    for header, cells in ((page.HEADER, page.standing_cells(report)), (page.JUDGE_HEADER, page.judge_cells(report))):
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(header):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        console.print()
    for text in (*page.remarks(report), *page.agreement_lines(report)):
        console.print(f"- {text}", markup=False)
    console.print(page.conclusion(report), markup=False)
    console.print(f"  every answer with its marks: {out / 'quality.html'}", markup=False)
