"""`pingjia data check|prepare`: look at data files; write what can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import console
from pingjia.cli.schema import load_recipe
from pingjia.cli.tokenizer import tokenizer
from pingjia.cli.train import Overrides, RecipePath

if TYPE_CHECKING:
    from pingjia.data import CheckReport

app = typer.Typer(help="Check and prepare data files.", no_args_is_help=True)
app.command("tokenizer")(tokenizer)

MAX_SHOWN = 50


@app.command("check")
def check(
    files: Annotated[
        list[str],
        typer.Argument(help="JSONL, JSON, CSV or Parquet files, also in gzip; or samples:NAME.", metavar="FILE..."),
    ],
    model: Annotated[str | None, typer.Option("--model", help="Count lengths in this model's tokens.")] = None,
    cutoff_len: Annotated[int | None, typer.Option(help="With --model: the longest row, in tokens.", min=8)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Print FILE:LINE: field: reason for every problem. Exit 0 only when there is none."""
    from pingjia import chat, data

    tokenizer = chat.load_tokenizer(model) if model else None
    report = data.check_files(files, tokenizer, cutoff_len, content=True)
    if as_json:
        console.print_json(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_report(report)
    return 0 if report.ok else 2


def print_report(report: CheckReport, *, indent: str = "") -> None:
    """Problems first, one a line; then what the files hold."""
    for problem in report.problems[:MAX_SHOWN]:
        console.print(str(problem), markup=False)
    if report.num_problems > MAX_SHOWN:
        console.print(f"... and {report.num_problems - MAX_SHOWN} more problems (all of them with --json)")
    for note in report.notes[:MAX_SHOWN]:
        console.print(f"note: {note}", markup=False)
    counts = f"{report.num_rows} rows, {report.num_examples} good, {report.num_problems} problems"
    share = f"; Chinese {report.zh_share:.0%} of the letters" if report.zh_share is not None else ""
    console.print(f"{indent}{counts}{share}")
    for name, values in (("domains", report.domains), ("languages", report.langs), ("layouts", report.layouts)):
        if set(values) - {"-"}:
            console.print(f"{indent}{name}: " + ", ".join(f"{key} {count}" for key, count in values.items()))
    if report.lengths:
        size = report.lengths
        console.print(f"{indent}length in {size.unit}: median {size.p50}, 90 % {size.p90}, longest {size.longest}")


@app.command("prepare")
def prepare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Directory to create.")] = Path("prepared"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Check, filter, balance and augment a recipe's rows: train.jsonl, rejected.jsonl with reasons, report.html.

    The same command again goes on where it was interrupted.
    """
    from pingjia.cli.prepare import prepare_recipe, print_prepared

    result = prepare_recipe(load_recipe(recipe, overrides or []), out, quiet=as_json)
    if as_json:
        console.print_json(json.dumps(result.report.to_dict(), ensure_ascii=False))
    else:
        print_prepared(result, out)
    return 0
