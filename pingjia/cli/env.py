"""`pingjia env`, `pingjia version`: what runs here, for a bug report."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pingjia import __version__
from pingjia.cli.console import console, megabytes


def version() -> None:
    """Print the version."""
    console.print(f"pingjia {__version__}")


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Print hardware and versions, for a bug report. Holds no names of users, hosts or paths but the current disk's."""
    from pingjia.cli import machine

    found = machine.describe()
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
        return
    rows = {
        "python": f"{found.python} on {found.platform}",
        "cpu": f"{found.cpu_model}, {found.usable_cores} usable of {found.logical_cores} cores "
        f"({' '.join(found.cpu_instruction_sets) or 'no vector extensions found'})",
        "memory": f"{megabytes(found.memory_bytes)}, available {megabytes(found.memory_available_bytes or 0)}",
        "disk": f"{megabytes(found.disk_free_bytes)} free at {found.disk_path}",
        "accelerators": ", ".join(f"{g.vendor} {g.name} {megabytes(g.memory_bytes or 0)}" for g in found.gpus)
        or "none",
        "compiler": found.compiler or "none",
    } | {name: value for name, value in found.packages.items() if value}
    for name, value in rows.items():
        console.print(f"{name:<18}{value}", markup=False)
