"""`pingjia exam SIDE FOLDER`: multiple choice from local files as C-Eval and CMMLU lay them out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pingjia.cli.console import console, errors, progress_bar
from pingjia.cli.sides import FORMS, check_side, generator_of

if TYPE_CHECKING:
    from pingjia.evaluate.exam import Exam, Paper
    from pingjia.types import Scorer


def exam(
    side: Annotated[str, typer.Argument(help=f"What is examined: {FORMS}.")],
    folder: Annotated[
        Path, typer.Argument(help="A folder with dev/ and val/ or test/, a folder of .csv, or one .csv.")
    ],
    against: Annotated[str | None, typer.Option("--against", help="Compare with this one; the same forms.")] = None,
    shots: Annotated[int, typer.Option(help="Answered examples before each question, from dev/.", min=0)] = 5,
    subject: Annotated[list[str] | None, typer.Option("--subject", help="These subjects alone; several times.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions of each subject.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Where exam.json goes.")] = Path("exam"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """How many multiple-choice questions does it get right? A model chooses the likeliest letter, a server says one."""
    from pingjia.evaluate.exam import difference, read_papers

    sides = [side] if against is None else [side, against]
    for one in sides:
        check_side(one)
    papers = read_papers(folder, subject or (), limit)
    _tell_missing_examples(papers, shots)
    exams = [_sit(one, papers, shots) for one in sides]
    exams[0].save(out / "exam.json")
    found = exams[0].to_dict()
    if against is not None:
        exams[1].save(out / "exam_against.json")
        change = difference(exams[1], exams[0])
        found["against"] = {"name": against, "difference": change.mean, "low": change.low, "high": change.high}
    console.print_json(json.dumps(found, ensure_ascii=False)) if as_json else _print(exams)


def _tell_missing_examples(papers: Sequence[Paper], shots: int) -> None:
    short = [paper.subject for paper in papers if len(paper.examples) < shots]
    if short:
        errors.print(
            f"note: {len(short)} of {len(papers)} subjects have under {shots} examples in dev/ (first {short[0]}); "
            "they are asked with what there is",
            markup=False,
        )


def _sit(side: str, papers: Sequence[Paper], shots: int) -> Exam:
    from pingjia.evaluate.exam import sit_by_answer, sit_by_likelihood

    is_server = side.startswith(("http://", "https://"))
    generator = generator_of(side)
    total = sum(1 if is_server else len(item.letters) for paper in papers for item in paper.items)
    with progress_bar(errors) as progress:
        task = progress.add_task(f"exam {side}", total=total, note="")

        def on_done() -> None:
            progress.advance(task)

        if is_server:
            return sit_by_answer(papers, generator, shots, side, on_done)
        return sit_by_likelihood(papers, cast("Scorer", generator), shots, side, on_done)


def _print(exams: Sequence[Exam]) -> None:
    from rich.table import Table

    from pingjia.evaluate.exam import difference

    first = exams[0]
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("subject", "questions", *(exam.name for exam in exams))):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, score in first.subjects().items():
        table.add_row(name, str(score.count), *(f"{100 * exam.subjects()[name].mean:.1f}" for exam in exams))
    console.print(table)
    for exam in exams:
        overall = exam.overall()
        console.print(
            f"{exam.name}: {100 * exam.mean_of_subjects:.1f} as the mean of subjects; {100 * overall.mean:.1f} % of "
            f"{overall.count} questions [{100 * overall.low:.1f}, {100 * overall.high:.1f}]; guessing gets "
            f"{100 * exam.chance():.1f} %; by {exam.way}, {exam.shots} examples",
            markup=False,
        )
        if exam.num_unread:
            console.print(f"  {exam.num_unread} answers named no letter and count as wrong", markup=False)
    if len(exams) > 1:
        change = difference(exams[1], first)
        console.print(
            f"difference {100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]", markup=False
        )
