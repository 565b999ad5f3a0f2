"""`pingjia export TUNED --out DIR`: what a run left, as a model directory to hand over, with proof."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import console, megabytes
from pingjia.errors import UserError

if TYPE_CHECKING:
    from pingjia.export import ExportReport


def export(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of a finished run: of an adapter, or of a model trained itself.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to create.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Instead: is this directory what the adapter and its base make?")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model lies, if not where it was trained.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, or copy a model that was trained itself, and check the saved files."""
    from pingjia import chat
    from pingjia.errors import ModelError
    from pingjia.export import check_export, export_model, merge_adapter
    from pingjia.tune.run import read_about

    if (out is None) == (check is None):
        raise UserError("give --out DIR to create one, or --check DIR to examine one that is there")
    about = read_about(adapter)
    if about is None:
        raise ModelError(f"{adapter}: no finished run here (no pingjia.json)")
    if check is not None:
        report = check_export(adapter, check, base=base, check_chats=_check_chats)
        _print(report, f"{check}: every tensor is there, and the tokenizer", "base plus adapter", as_json=as_json)
        return
    assert out is not None
    if about.get("finetuning_type", "lora") == "lora":
        tokenizer = chat.load_tokenizer(base or about["base"]["name"])
        report = merge_adapter(adapter, out, base=base, save_tokenizer=tokenizer.save, dtype=dtype)
        what, whom = f"merged {report.num_merged_modules} modules", "base plus adapter"
    elif base is not None:
        raise ModelError(f"{adapter} is a model of its own and needs no base; leave --base out")
    else:
        tokenizer = chat.load_tokenizer(adapter)
        report = export_model(adapter, out, save_tokenizer=tokenizer.save, dtype=dtype)
        what, whom = "saved the trained model", "it"
    _print(report, f"{what} into {out}", whom, as_json=as_json)


def _print(report: ExportReport, what: str, whom: str, *, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(asdict(report)))
        return
    console.print(f"{what} ({megabytes(report.stored_bytes)})", markup=False)
    console.print(
        f"proof on {report.num_prompts} chats: logits within {report.max_logit_diff:.2g} of {whom} "
        f"(allowed {report.tolerance:g}), up to {report.max_change_from_base:.2g} away from the base alone"
    )


def _check_chats(directory: Path, golden: list[dict[str, object]]) -> None:
    from pingjia import chat
    from pingjia.errors import ModelError

    try:
        chat.check_golden(chat.load_tokenizer(directory), golden)
    except ModelError as e:
        raise ModelError(f"{directory}: its tokenizer is missing or another one: {e}") from None
