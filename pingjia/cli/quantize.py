"""`pingjia quantize MODEL --out DIR`: pack a model's weights into 4 or 8 bits, calibrated, and measure the loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pingjia.cli.console import console, errors, megabytes, progress_bar

if TYPE_CHECKING:
    from pingjia.chat.tokenizer import Tokenizer
    from pingjia.data.calibration import Sample
    from pingjia.export.quantize import QuantizeReport
    from pingjia.models.compare import Comparison, Text
    from pingjia.models.compress import OnStep

MAX_LEN = 2048  # tokens of a calibration or held-out row
DEFAULT_TOKENS = 16384
# Of the rise in perplexity. SmolLM2, tiny and so the worst case, rises by 10 % with 4 bits, and by 25 % uncalibrated.
DEFAULT_LIMITS = {4: 0.15, 8: 0.01}


def quantize(
    model: Annotated[str, typer.Argument(help="Model directory, .gguf file, or packaged name; in floats.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to create.")],
    bits: Annotated[int, typer.Option(help="4 (a scale per group) or 8 (a scale per row).")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = 64,
    method: Annotated[str, typer.Option(help="gptq (calibrated) or rtn (to the nearest value; quick).")] = "gptq",
    head_bits: Annotated[int, typer.Option(help="Bits of embedding and head: 4, 8, or 16 to leave them.")] = 8,
    calibration: Annotated[
        list[str] | None, typer.Option("--calibration", help="Data or text file to calibrate on, or samples:NAME.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it to use.", min=128)] = DEFAULT_TOKENS,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Round columns with the largest inputs first.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure the loss on held-out text; refuse too large a one.")
    ] = False,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", help="With --verify: the text to measure on, or samples:NAME.")
    ] = None,
    held_out_tokens: Annotated[int, typer.Option(help="Tokens of it to use.", min=128)] = DEFAULT_TOKENS,
    max_perplexity_loss: Annotated[
        float | None, typer.Option(help="With --verify: the largest rise of perplexity; 0.05 is 5 %.", min=0)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Merge this adapter into MODEL first, then quantise; proven.")
    ] = None,
    layout: Annotated[str, typer.Option(help="group, or published: as published ChatGLM INT4 and INT8.")] = "group",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write MODEL with its weights in 4 or 8 bits. One block at a time is in memory."""
    from pingjia import chat
    from pingjia.errors import UserError
    from pingjia.export.quantize import QuantizeJob, quantize
    from pingjia.quant.settings import QuantizeSettings

    settings = QuantizeSettings(bits, group_size, method, head_bits, act_order, layout=layout)
    settings.check()
    verify = verify or adapter is not None
    if not verify and (held_out or max_perplexity_loss is not None):
        raise UserError("--held-out and --max-perplexity-loss are for --verify; give it too")
    if out.exists():
        raise UserError(f"{out} exists; choose a new directory, nothing is overwritten")
    tokenizer = chat.load_tokenizer(model)
    texts = _Texts(tokenizer, quiet=as_json)
    rows = texts.calibration(calibration, calibration_tokens) if method == "gptq" else ()
    measured = texts.held_out(held_out, held_out_tokens) if verify else None
    limit = DEFAULT_LIMITS[bits] if max_perplexity_loss is None else max_perplexity_loss
    with _merged(model, adapter, out, tokenizer) as name, _steps(as_json) as on_step:
        source = {"model": model} | ({"adapter": str(adapter)} if adapter else {})
        job = QuantizeJob(name, out, settings, rows, measured, limit, texts.notes | {"source": source})
        report = quantize(job, save_tokenizer=tokenizer.save, on_step=on_step)
    if as_json:
        console.print_json(json.dumps(report.as_dict()))
    else:
        _print(report, out)


class _Texts:
    """What is calibrated and measured on; `notes` says so in the record."""

    def __init__(self, tokenizer: Tokenizer, *, quiet: bool) -> None:
        self._tokenizer, self._quiet = tokenizer, quiet
        self._learnt: tuple[str, ...] = ()
        self.notes: dict[str, Any] = {}

    def calibration(self, files: list[str] | None, max_tokens: int) -> Sequence[Sequence[int]]:
        from pingjia.data.calibration import CALIBRATION

        found = self._sample("calibration", files or CALIBRATION, max_tokens)
        self._learnt = found.files
        return found.rows

    def held_out(self, files: list[str] | None, max_tokens: int) -> list[Text]:
        from pingjia.data.calibration import HELD_OUT, require_different
        from pingjia.models.compare import Text

        require_different(self._learnt, files or HELD_OUT)
        found = self._sample("held_out_text", files or HELD_OUT, max_tokens)
        return [Text(*pair) for pair in zip(found.rows, found.langs, strict=True)]

    def _sample(self, key: str, files: Sequence[str], max_tokens: int) -> Sample:
        from pingjia.data.calibration import sample

        found = sample(files, self._tokenizer, max_tokens, MAX_LEN)
        counts = {"rows": len(found.rows), "tokens": found.num_tokens, "rows_too_long": found.num_passed_over}
        self.notes[key] = {"files": list(found.files), "sha256": found.sha256} | counts
        if not self._quiet:
            passed = f"; {found.num_passed_over} over {MAX_LEN} tokens passed over" if found.num_passed_over else ""
            name = key.replace("_", " ").removesuffix(" text")
            console.print(f"{name} text: {len(found.rows)} rows, {found.num_tokens:,} tokens{passed}")
        return found


@contextmanager
def _steps(quiet: bool) -> Iterator[OnStep]:
    with progress_bar(errors, quiet=quiet) as bar:
        task = bar.add_task("", total=None, note="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, note=what)


@contextmanager
def _merged(model: str, adapter: Path | None, out: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The model to quantise: itself, or merged with the adapter into a folder beside OUT that is gone afterwards."""
    if adapter is None:
        yield model
        return
    from pingjia.export import merge_adapter

    folder = out.with_name(f"{out.name}.merged")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        report = merge_adapter(adapter, folder, base=model, save_tokenizer=tokenizer.save)
        console.print(
            f"merged {report.num_merged_modules} modules of {adapter}: logits within {report.max_logit_diff:.2g} of "
            "base plus adapter"
        )
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- what is shown


def _print(report: QuantizeReport, out: Path) -> None:
    if report.num_reused:
        console.print(f"{report.num_reused} shards of an interrupted run were kept")
    if report.comparison is not None:
        _print_comparison(report.comparison)
    else:
        worst = max(report.errors, key=lambda e: e.relative_error)
        console.print(f"largest error of a matrix: {worst.relative_error:.2%} of its output, {worst.name}")
    console.print(f"{megabytes(report.stored_bytes)} in {out}, {report.bits_per_weight:.2f} bits per weight")


def _print_comparison(comparison: Comparison) -> None:
    table = Table("text", "tokens", "perplexity", "packed", "loss", "KL, nats", "same top-1", box=None)
    named = {"all": comparison.total} | (comparison.by_label if len(comparison.by_label) > 1 else {})
    for name, t in named.items():
        before, after = f"{t.perplexity_original:.3f}", f"{t.perplexity_packed:.3f}"
        shown = f"{t.perplexity_loss:+.2%}", f"{t.mean_kl:.4f}", f"{t.top1_agreement:.1%}"
        table.add_row(name, f"{t.num_tokens:,}", before, after, *shown)
    console.print(table)
    blocks = Table("block", "relative error of its hidden states", box=None)
    for path, error in comparison.blocks:
        blocks.add_row(path, f"{error:.4f}")
    console.print(blocks)
