"""`pingjia doctor [RECIPE]`: is this machine fit, and would this recipe run? Every finding says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from pingjia.cli.console import console, duration, megabytes
from pingjia.cli.schema import Recipe, load_recipe
from pingjia.cli.train import Overrides
from pingjia.errors import PingjiaError

T = TypeVar("T")

# The smallest machine the sample recipe was run on, and what the published plan recommends for ChatGLM-6B.
MIN_MEMORY_BYTES = 6e9
MIN_DISK_BYTES = 5e9
RECOMMENDED = "for ChatGLM-6B at fp16: a 24 GB GPU, 8 cores, 32 GB of memory, 500 GB of disk"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the list. `fix` says what to do unless the state is "ok"."""

    name: str
    state: Literal["ok", "note", "bad"]
    detail: str
    fix: str = ""


def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Also rehearse this recipe.", metavar="[RECIPE]")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Check this machine; with a recipe, rehearse it: data, longest batch, save, reload, answer."""
    findings = []
    for finding in _findings(recipe, overrides or []):
        findings.append(finding)
        if not as_json:
            _print(finding)
    bad = sum(f.state == "bad" for f in findings)
    if as_json:
        console.print_json(json.dumps([asdict(f) for f in findings], ensure_ascii=False))
    else:
        console.print(f"{len(findings)} checks, {bad} to put right")
    return 2 if bad else 0


def _print(finding: Finding) -> None:
    mark = {"ok": "  ok  ", "note": " note ", "bad": " BAD  "}[finding.state]
    console.print(f"[{mark}] {finding.name}: {finding.detail}", markup=False)
    if finding.fix:
        console.print(f"         -> {finding.fix}", markup=False)


def _findings(recipe: Path | None, overrides: list[str]) -> Iterator[Finding]:
    yield from _machine()
    if recipe is None:
        return
    loaded = _attempt("recipe", lambda: load_recipe(recipe, overrides))
    if isinstance(loaded, Finding):
        yield loaded
        return
    yield Finding("recipe", "ok", f"{recipe} is complete")
    for name, check in _ROAD.items():
        result = _attempt(name, partial(check, loaded))
        finding = result if isinstance(result, Finding) else Finding(name, "ok", result)
        yield finding
        if finding.state == "bad":
            return


def _attempt(name: str, check: Callable[[], T]) -> T | Finding:
    try:
        return check()
    except PingjiaError as e:
        return Finding(name, "bad", str(e), "put this right and run doctor again; the checks after it were not made")


def _machine() -> Iterator[Finding]:
    from pingjia.cli import machine

    found = machine.describe()
    yield Finding("python", "ok", found.python)
    missing = [
        name for name in ("torch", "transformers", "peft", "accelerate", "safetensors") if not found.packages[name]
    ]
    if missing:
        yield Finding("packages", "bad", f"missing: {', '.join(missing)}", "pip install 'pingjia[model]'")
    else:
        names = ("torch", "transformers", "peft")
        yield Finding("packages", "ok", ", ".join(f"{name} {found.packages[name]}" for name in names))
    yield _memory(found.memory_available_bytes or found.memory_bytes)
    yield _disk(found.disk_free_bytes, found.disk_path)
    sets = " ".join(found.cpu_instruction_sets)
    yield Finding(
        "cpu",
        "ok" if sets else "note",
        f"{found.cpu_model}, {found.usable_cores} cores, {sets or 'no vector extensions found'}",
    )
    bandwidth = machine.measure_read_bandwidth()
    yield Finding(
        "memory bandwidth",
        "ok",
        f"{bandwidth:.0f} GB/s read: no network of N GB answers faster than {bandwidth:.0f}/N tokens/s here",
    )
    gpus = ", ".join(f"{g.vendor} {g.name} {megabytes(g.memory_bytes or 0)}" for g in found.gpus)
    yield Finding(
        "accelerator", "ok" if gpus else "note", gpus or "none: everything runs on the CPU", "" if gpus else RECOMMENDED
    )
    yield Finding(
        "compiler",
        "ok" if found.compiler else "note",
        found.compiler or "none found",
        "" if found.compiler else "apt-get install g++",
    )
    yield _packaged_model()


def _memory(available: float) -> Finding:
    detail = f"{megabytes(available)} available"
    if available < MIN_MEMORY_BYTES:
        return Finding(
            "memory",
            "bad",
            detail,
            f"the sample recipe needs about {megabytes(MIN_MEMORY_BYTES)}; close other programs",
        )
    return Finding("memory", "ok", detail)


def _disk(free: float, path: str) -> Finding:
    detail = f"{megabytes(free)} free at {path}"
    if free < MIN_DISK_BYTES:
        return Finding("disk", "bad", detail, f"make room: at least {megabytes(MIN_DISK_BYTES)}")
    return Finding("disk", "ok", detail)


def _packaged_model() -> Finding:
    from pingjia.locate import PACKAGED, locate_model

    found = _attempt("packaged model", lambda: locate_model("smollm2"))
    if isinstance(found, Finding):
        return Finding("packaged model", "note", "smollm2 is not installed", PACKAGED["smollm2"].install)
    return Finding("packaged model", "ok", f"smollm2, {megabytes(found.stat().st_size)}")


def _check_data(recipe: Recipe) -> str:
    from pingjia import chat, data
    from pingjia.errors import DataError

    tokenizer = chat.load_tokenizer(recipe.model.model_name_or_path)
    report = data.check_files(
        [*recipe.data.dataset, *recipe.data.eval_dataset],
        tokenizer,
        recipe.data.cutoff_len,
        domains=recipe.data.domains,
    )
    if not report.ok:
        raise DataError(f"{report.num_problems} problems, the first: {report.problems[0]}")
    longest = f"longest {report.lengths.longest} of {recipe.data.cutoff_len} tokens" if report.lengths else ""
    return f"{report.num_examples} rows, no problem; {longest}"


def _check_identity(recipe: Recipe) -> str:
    from pingjia import chat

    tokenizer = chat.load_tokenizer(recipe.model.model_name_or_path)
    golden = chat.golden_chats(tokenizer)
    chat.check_golden(chat.load_tokenizer(recipe.model.model_name_or_path), golden)
    return f"{len(golden)} chats become the same tokens in training and in serving"


def _check_training(recipe: Recipe) -> str:
    from pingjia.tune.rehearse import rehearse

    found = rehearse(recipe.model, recipe.data, recipe.tune)
    planned = f" ({megabytes(found.memory.total)} planned)" if found.memory is not None else ""
    less = f"; {found.event}" if found.event is not None else ""
    return (
        f"longest batch {found.batch_tokens} tokens: {found.seconds:.2f} s an update, peak "
        f"{megabytes(found.peak_bytes)}{planned}{less}; what it trains saved and read back bit by bit; "
        f"whole run ({found.num_steps} updates) about {duration(found.seconds_estimated)}"
    )


def _check_answer(recipe: Recipe) -> str:
    from pingjia import Engine, Message, Sampling

    engine = Engine(
        recipe.model.model_name_or_path,
        settings=recipe.engine,
        dtype=recipe.model.dtype,
        bits=recipe.model.quantization_bit,
        device=recipe.model.device,
    )
    answer = engine.generate([[Message("user", "你好")]], Sampling(max_tokens=8))[0]
    return f"the engine answers ({answer.usage.completion_tokens} tokens)"


def _check_port(recipe: Recipe) -> str:
    from pingjia import gateway

    gateway.check_port(recipe.serve.host, recipe.serve.port)
    return f"port {recipe.serve.port} on {recipe.serve.host} is free"


_ROAD: dict[str, Callable[[Recipe], str]] = {
    "data": _check_data,
    "train-serve identity": _check_identity,
    "training": _check_training,
    "answering": _check_answer,
    "port": _check_port,
}
