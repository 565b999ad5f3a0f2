"""`pingjia cost compare RECIPE`: full fine-tuning, LoRA and QLoRA, really run, on the same rows to the same loss.

Everything runs in a process of its own, so that peak memory is that of the arm alone, and one after the other. What is
estimated for another machine is printed, and kept, apart.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import pingjia
from pingjia.cli.compare_arms import ARMS, Arms, Length, run_child
from pingjia.cli.compare_serving import Job
from pingjia.cli.console import console, duration, errors, megabytes
from pingjia.cli.schema import Recipe, load_recipe
from pingjia.cli.stages import Stages, digest
from pingjia.cost import compare as measured
from pingjia.cost import compare_elsewhere as elsewhere
from pingjia.cost.compare import Arm, Row, Serving
from pingjia.cost.compare_claims import Claim, claims
from pingjia.cost.prices import Prices, resolve
from pingjia.errors import DataError, UserError

MIN_HELD_OUT = 4
_WIDTH = 130  # of tables, also where output goes to a file
_WAYS = {  # what each way to serve is, in words
    "base": "the base, untrained",
    "full": "full fine-tuning, fp32",
    "lora": "LoRA beside the base",
    "lora_merged": "LoRA merged, fp32",
    "int8": "LoRA merged, INT8",
    "int4": "LoRA merged, INT4",
    "qlora_int8": "QLoRA beside its INT8 base",
    "qlora_int4": "QLoRA beside its INT4 base",
    "batch_of_8": "LoRA merged, fp32, 8 answers at once",
    "cached": "LoRA merged, answer from the cache",
}
_SERVED_AS = {"full": "full", "lora": "lora_merged", "qlora_int8": "qlora_int8", "qlora_int4": "qlora_int4"}


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared, and how long it may take."""

    arms: tuple[str, ...] = tuple(ARMS)
    length: Length = field(default_factory=Length)
    held_out: int = 16
    loss: float | None = None
    serving: bool = True
    num_questions: int = 5
    num_tokens: int = 32
    gpu: elsewhere.Hardware = elsewhere.GPU_24GB

    def check(self) -> None:
        """Raises UserError for a comparison that could not come to anything."""
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(set(self.arms)) != len(self.arms) or len(self.arms) < 2:
            raise UserError(f"--arms {','.join(self.arms)}: at least two different ones of {', '.join(ARMS)}")
        if self.held_out < MIN_HELD_OUT:
            raise UserError(f"--held-out {self.held_out}: at least {MIN_HELD_OUT} rows, or their loss says nothing")
        self.length.check()


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a comparison came to. `seconds`: of this call; less where parts had been measured before."""

    loss: float
    arms: tuple[Arm, ...]
    rows: tuple[Row, ...]
    servings: Mapping[str, Serving]
    claims: tuple[Claim, ...]
    elsewhere: Mapping[str, Any]
    prices: Prices
    num_held_out: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is measured and what is extrapolated under keys of their own."""
        return {
            "measured": {
                "held_out_loss": self.loss,
                "num_held_out": self.num_held_out,
                "currency": self.prices.currency,
                "price": self.prices.source,
                "rows": [measured.as_values(row) for row in self.rows],
                "arms": [arm.to_dict() for arm in self.arms],
                "serving": {name: asdict(serving) for name, serving in self.servings.items()},
                "seconds_of_this_call": round(self.seconds, 1),
            },
            "claims": [asdict(claim) for claim in self.claims],
            "extrapolated": dict(self.elsewhere),
        }


def compare(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with an eval_dataset.", metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    arms: Annotated[str, typer.Option(help="Which to run, with commas between.")] = ",".join(ARMS),
    updates: Annotated[int, typer.Option(help="Updates of each arm.", min=2)] = 20,
    look: Annotated[int, typer.Option(help="Updates between two looks at the held-out rows.", min=1)] = 4,
    trial_updates: Annotated[
        int, typer.Option(help="Updates to try each of two rates; 0: full takes a tenth of the recipe's rate.", min=0)
    ] = 4,
    held_out: Annotated[int, typer.Option(help="Held-out rows to measure on.", min=1)] = 16,
    loss: Annotated[float | None, typer.Option(help="Compare at this loss; else the lowest all reached.")] = None,
    serving: Annotated[bool, typer.Option("--serving/--no-serving", help="Also measure answering.")] = True,
    gpu_tflops: Annotated[float, typer.Option(help="Extrapolation: peak of the GPU, dense fp16.", min=0.001)] = 165,
    gpu_gb_per_s: Annotated[float, typer.Option(help="Extrapolation: its memory bandwidth.", min=0.001)] = 1008,
    gpu_memory_gb: Annotated[float, typer.Option(help="Extrapolation: its memory.", min=0.001)] = 24,
    gpu_utilisation: Annotated[float, typer.Option(help="Extrapolation: share of it.", min=0.001, max=1)] = 0.35,
    gpu_price_per_hour: Annotated[float | None, typer.Option(help="Extrapolation: its price.", min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the measured table as CSV.")] = False,
) -> None:
    """Train in full, with LoRA and with QLoRA to the same held-out loss here, and print what each takes.

    Finished parts are kept in OUTPUT_DIR/compare: the same command again goes on where it was stopped.
    """
    gpu = elsewhere.Hardware(
        f"a {gpu_memory_gb:g} GB GPU", gpu_tflops, gpu_gb_per_s, gpu_memory_gb, gpu_utilisation, gpu_price_per_hour
    )
    names = tuple(name.strip() for name in arms.split(",") if name.strip())
    options = Options(names, Length(updates, look, trial_updates), held_out, loss, serving, gpu=gpu)
    outcome = run_comparison(load_recipe(recipe, overrides or []), options, _progress)
    if as_json:
        console.print_json(json.dumps(outcome.to_dict(), ensure_ascii=False))
    elif as_csv:
        console.print(measured.to_csv(outcome.rows), end="", markup=False)
    else:
        print_outcome(outcome)


def _progress(line: str) -> None:
    errors.print(f"  {line}", markup=False)


def run_comparison(recipe: Recipe, options: Options, say: Callable[[str], None]) -> Outcome:
    """Run what is not measured yet, in OUTPUT_DIR/compare, and put it together; writes compare.json and compare.csv.

    Raises UserError (nonsense), DataError (no held-out rows), TrainingError (an arm failed, or no equal loss).
    """
    options.check()
    prices = resolve(recipe.cost)
    started, folder = time.perf_counter(), Path(recipe.tune.output_dir) / "compare"
    held_out, questions = _held_out(recipe, options.held_out, folder)
    runner = Arms(recipe, folder, held_out, options.length, say)
    arms = [runner.run(name) for name in options.arms]
    loss = measured.common_loss(arms, options.loss)
    servings = _Servings(recipe, runner, folder, say).measure(options, questions) if options.serving else {}
    of_arms = {arm: servings[way] for arm, way in _SERVED_AS.items() if way in servings}
    rows = measured.rows(arms, loss, prices, of_arms)
    estimated = elsewhere.estimates(arms, loss, recipe.tune.lora_rank, elsewhere.CHATGLM_6B, options.gpu)
    outcome = Outcome(
        loss=loss,
        arms=tuple(arms),
        rows=tuple(rows),
        servings=servings,
        claims=tuple(claims(rows, servings)),
        elsewhere=elsewhere.as_report(estimated, elsewhere.CHATGLM_6B, options.gpu),
        prices=prices,
        num_held_out=len(held_out.read_text(encoding="utf-8").splitlines()),
        seconds=time.perf_counter() - started,
    )
    (folder / "compare.json").write_text(json.dumps(outcome.to_dict(), ensure_ascii=False, indent=1) + "\n", "utf-8")
    (folder / "compare.csv").write_text(measured.to_csv(rows), "utf-8")
    return outcome


def _held_out(recipe: Recipe, count: int, folder: Path) -> tuple[Path, list[str]]:
    """A file of the held-out rows that all arms are measured on, and questions to ask from them."""
    from pingjia import data
    from pingjia.data.write import row_of

    if not recipe.data.eval_dataset:
        raise DataError("eval_dataset: missing; an equal held-out loss needs rows that are not trained on")
    problems: list[str] = []
    domains = recipe.data.domains
    found = list(
        data.read_examples(
            recipe.data.eval_dataset, domains=domains, max_samples=count, on_problem=lambda p: problems.append(str(p))
        )
    )
    if problems:
        raise DataError(f"eval_dataset: {len(problems)} rows cannot be used, the first: {problems[0]}")
    if len(found) < MIN_HELD_OUT:
        raise DataError(f"eval_dataset: {len(found)} rows; at least {MIN_HELD_OUT}, or their loss says nothing")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "held_out.jsonl"
    text = "".join(json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in found)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file, [example.prompt[-1].text for example in found]


class _Servings:
    """Measures how the arms' results answer, each way in a process of its own."""

    def __init__(self, recipe: Recipe, arms: Arms, folder: Path, say: Callable[[str], None]) -> None:
        self._recipe, self._arms, self._folder, self._say = recipe, arms, folder, say
        self._stages = Stages(folder)

    def measure(self, options: Options, questions: Sequence[str]) -> dict[str, Serving]:
        asked = tuple(questions[: options.num_questions])
        return {name: self._one(name, job) for name, job in self._jobs(options, asked).items()}

    def _jobs(self, options: Options, questions: tuple[str, ...]) -> dict[str, Job]:
        model = self._recipe.model
        base = Job(model.model_name_or_path, questions, options.num_tokens, dtype=model.dtype, device=model.device)
        jobs = {} if "full" in options.arms else {"base": base}
        for arm in options.arms:
            result = str(self._arms.result_of(arm))
            if arm == "full":
                jobs["full"] = replace(base, model=result)
            elif arm == "lora":
                jobs |= self._of_lora(base, result)
            else:
                jobs[arm] = replace(base, bits={"qlora_int8": 8, "qlora_int4": 4}[arm], adapter=result)
        return jobs

    def _of_lora(self, base: Job, result: str) -> dict[str, Job]:
        merged = replace(base, model=str(self._merged(result)))
        return {
            "lora": replace(base, adapter=result),
            "lora_merged": merged,
            "int8": replace(merged, bits=8),
            "int4": replace(merged, bits=4),
            "batch_of_8": replace(merged, way="batch"),
            "cached": replace(merged, way="cached"),
        }

    def _merged(self, result: str) -> Path:
        """The LoRA arm's adapter in its base; made again when the adapter is another one."""
        out = self._folder / "lora" / "merged"
        inputs = (self._folder / "lora" / "run" / "inputs").read_text(encoding="utf-8")
        if self._stages.result("lora.merged", inputs) is None or not out.exists():
            self._say("lora: merging")
            shutil.rmtree(out, ignore_errors=True)
            base = self._recipe.model.model_name_or_path
            run_child(_pingjia("export", result, "--out", str(out), "--base", base), self._folder / "merge.log")
            self._stages.finish("lora.merged", inputs, True)
        return out

    def _one(self, name: str, job: Job) -> Serving:
        inputs = digest((), job.to_line(), self._trained(), pingjia.__version__)
        known = self._stages.result(f"serving.{name}", inputs)
        if known is None:
            self._say(f"serving: {_WAYS[name]}")
            command = _module("pingjia.cli.compare_serving", job.to_line())
            known = run_child(command, self._folder / "serving" / f"{name}.log")
            self._stages.finish(f"serving.{name}", inputs, known)
        return Serving(name=name, **known)

    def _trained(self) -> list[str]:
        """What the arms that are here were trained from."""
        notes = [self._arms.result_of(arm) / "inputs" for arm in ARMS]
        return [note.read_text(encoding="utf-8") for note in notes if note.exists()]


def _module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", name, *words]


def _pingjia(*words: str) -> list[str]:
    return _module("pingjia.cli.main", *words)


# ---- on the terminal


def print_outcome(outcome: Outcome) -> None:
    """The measured tables, the claims, and, apart from them, the estimate."""
    currency = outcome.prices.currency
    console.print(
        f"measured here, to held-out loss {outcome.loss:.4f} ({outcome.num_held_out} rows); {outcome.prices.source}",
        markup=False,
    )
    _show(_arms_table(outcome.rows, currency))
    if outcome.servings:
        console.print("\nmeasured here: where the time of an answer goes", markup=False)
        _show(_serving_table(outcome.servings))
    console.print("\nwhat was claimed, and what was measured")
    for claim in outcome.claims:
        console.print(f"  {claim.claim}: {claim.measured or 'not measured'}\n    {claim.why}", markup=False)
    _print_elsewhere(outcome.elsewhere, currency)


def _show(table: Table) -> None:
    """In its own width: a figure that is cut or broken over two lines is misread."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH, highlight=False).print(table)
    console.print("\n".join(line.rstrip() for line in text.getvalue().splitlines()), markup=False)


def _arms_table(rows: Sequence[Row], currency: str) -> Table:
    table = Table(box=None, pad_edge=False)
    names = (
        "  arm",
        "rate",
        "best loss",
        "updates",
        "training hours",
        "to keep",
        "peak memory",
        "first token",
        "per token",
        currency,
    )
    for name in names:
        table.add_column(name, justify="left" if name == "  arm" else "right")
    for row in rows:
        point, serving = row.reached, row.serving
        table.add_row(
            f"  {row.arm}",
            f"{row.rate:g}",
            f"{row.best_loss:.3f}",
            "-" if point is None else f"{point.updates:.1f}",
            "-" if point is None else f"{point.seconds / 3600:.4f}",
            megabytes(row.stored_bytes),
            megabytes(row.peak_bytes),
            "-" if serving is None else f"{serving.first_token_s * 1000:.0f} ms",
            "-" if serving is None else f"{serving.per_token_s * 1000:.1f} ms",
            "-" if row.money is None else f"{float(row.money):.4f}",
        )
    return table


def _serving_table(servings: Mapping[str, Serving]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("  way", "first token", "per token", "whole answer", "tokens/s", "peak memory"):
        table.add_column(name, justify="left" if name == "  way" else "right")
    for name, s in servings.items():
        table.add_row(
            f"  {_WAYS[name]}",
            f"{s.first_token_s * 1000:.1f} ms",
            f"{s.per_token_s * 1000:.1f} ms",
            f"{s.answer_s * 1000:.1f} ms",
            f"{s.tokens_per_s:.0f}",
            megabytes(s.peak_bytes),
        )
    return table


def _print_elsewhere(report: Mapping[str, Any], currency: str) -> None:
    gpu, network = report["machine"], report["network"]
    console.print(
        f"\nESTIMATED, not measured: {network['name']} on {gpu['name']} ({gpu['tflops']:g} TFLOP/s at "
        f"{gpu['utilisation']:.0%}, {gpu['gb_per_s']:g} GB/s)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("  arm", "training", "memory", "fits", "to keep", "per token", currency):
        table.add_column(name, justify="left" if name == "  arm" else "right")
    for arm in report["arms"]:
        table.add_row(
            f"  {arm['arm']}",
            duration(arm["train_hours"] * 3600),
            f"{arm['memory_gb']:.1f} GB",
            "yes" if arm["fits"] else "no",
            f"{arm['stored_gb']:.3f} GB",
            f"{arm['ms_per_token']:.1f} ms",
            "-" if arm["money"] is None else f"{arm['money']:.4f}",
        )
    _show(table)
    for name, formula in report["formulas"].items():
        console.print(f"    {name}: {formula}", markup=False)
