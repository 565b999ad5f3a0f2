"""`pingjia doctor [RECIPE]`: is this machine fit, and would this recipe run? Every finding says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from pingjia.cli.console import console, megabytes
from pingjia.cli.doctor_hardware import outdated, standings
from pingjia.cli.doctor_road import Road, Skipped, Step
from pingjia.cli.machine import Machine
from pingjia.cli.schema import load_recipe
from pingjia.cli.train import Overrides
from pingjia.errors import PingjiaError

T = TypeVar("T")

# The smallest machine the sample recipe was run on.
MIN_MEMORY_BYTES = 6e9
MIN_DISK_BYTES = 5e9


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
    """Check this machine; with a recipe, walk its whole road in small: data, training, merging, packing, answering.

    Predicts memory, time, tokens/s and money of the recipe. Leaves nothing behind.
    """
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
    with Road(loaded) as road:
        for step in road.steps():
            finding = _taken(step)
            yield finding
            if finding.state == "bad":
                return


def _taken(step: Step) -> Finding:
    """A step of the road. What no error of ours explains is a finding too: doctor is asked when things go wrong."""
    try:
        return Finding(step.name, "ok", step.check())
    except Skipped as e:
        return Finding(step.name, "note", f"not made: {e}")
    except (PingjiaError, OSError) as e:
        text = str(e) if isinstance(e, PingjiaError) else f"{e.filename or 'file'}: {e.strerror}"
        return Finding(step.name, "bad", text, f"{step.fix}; the checks after this one were not made")


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
    old = outdated(found.packages)
    if missing:
        yield Finding("packages", "bad", f"missing: {', '.join(missing)}", "pip install 'pingjia[model]'")
    elif old:
        yield Finding("packages", "bad", f"too old: {', '.join(old)}", "pip install --upgrade 'pingjia[model]'")
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
    yield _accelerator(found)
    yield Finding(
        "compiler",
        "ok" if found.compiler else "note",
        found.compiler or "none found",
        "" if found.compiler else "apt-get install g++",
    )
    yield _packaged_model()
    for standing in standings(found):
        need = standing.need
        state: Literal["ok", "note"] = "ok" if standing.is_enough else "note"
        yield Finding(f"plan: {need.name}", state, standing.detail, "" if standing.is_enough else need.otherwise)


def _accelerator(found: Machine) -> Finding:
    if not found.gpus:
        return Finding("accelerator", "note", "none: everything runs on the CPU", "enough for small models")
    silent = [gpu for gpu in found.gpus if not gpu.driver]
    gpus = ", ".join(
        f"{g.vendor} {g.name} {megabytes(g.memory_bytes or 0)}, driver {g.driver or 'unknown'}"
        + (f", compute capability {g.compute_capability}" if g.compute_capability else "")
        for g in found.gpus
    )
    if "+cpu" in (found.packages["torch"] or ""):
        return Finding("accelerator", "bad", f"{gpus}; torch is built for the CPU alone", "install torch for the GPU")
    fix = "install the vendor's driver; its own command must list the device" if silent else ""
    return Finding("accelerator", "note" if silent else "ok", gpus, fix)


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
