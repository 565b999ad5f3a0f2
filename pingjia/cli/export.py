"""`pingjia export TUNED --out DIR`: what a run left, as a model directory to hand over, with proof."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pingjia.cli.console import console, megabytes


def export(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of a finished run: of an adapter, or of a model trained itself.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to create.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model lies, if not where it was trained.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, or copy a model that was trained itself, and check the saved files."""
    from pingjia import chat
    from pingjia.errors import ModelError
    from pingjia.export import export_model, merge_adapter
    from pingjia.tune.run import read_about

    about = read_about(adapter)
    if about is None:
        raise ModelError(f"{adapter}: no finished run here (no pingjia.json)")
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
    if as_json:
        console.print_json(json.dumps(asdict(report)))
        return
    console.print(f"{what} into {out} ({megabytes(report.stored_bytes)})")
    console.print(
        f"proof on {report.num_prompts} chats: logits within {report.max_logit_diff:.2g} of {whom} "
        f"(allowed {report.tolerance:g}), up to {report.max_change_from_base:.2g} away from the base alone"
    )
