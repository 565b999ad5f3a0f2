"""This machine beside the plan's two: the smallest that ChatGLM-6B is tuned on, and the one that is recommended.

Says what is missing, never that nothing works: a smaller model needs less. Reads no hardware itself (`machine.py`).
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pingjia.cli.machine import Machine

PLAN_MODEL = "ChatGLM-6B"


@dataclass(frozen=True, slots=True)
class Need:
    """A quantity of the plan: the least, and what is recommended. `unit` follows the number."""

    name: str
    least: float
    recommended: float
    unit: str
    otherwise: str


NEEDS = (
    Need(
        "gpu memory", 24, 24, "GB", "train over an INT4 base (quantization_bit: 4: about 7 GB), or on the CPU, slowly"
    ),
    Need("cores", 8, 16, "", "fewer only take longer: preparing rows, compressing, answering on the CPU"),
    Need("memory", 32, 64, "GB", "keep the base packed (quantization_bit: 4 or 8), or take a smaller model"),
    Need("disk", 500, 1000, "GB", "keep adapters rather than merged models, and save_total_limit: 1"),
)
_TOLERANCE = 0.95  # a "32 GB" machine shows a little less, and so does a "24 GB" card


@dataclass(frozen=True, slots=True)
class Standing:
    """What there is of a need. `is_enough`: of the least."""

    need: Need
    have: float

    @property
    def is_enough(self) -> bool:
        return self.have >= self.need.least * _TOLERANCE

    @property
    def detail(self) -> str:
        unit = f" {self.need.unit}" if self.need.unit else ""
        return (
            f"{self.have:.0f}{unit}; for {PLAN_MODEL} at least {self.need.least:g}{unit}, "
            f"recommended {self.need.recommended:g}{unit}"
        )


def standings(found: Machine) -> list[Standing]:
    """Every need of the plan beside what this machine has."""
    have = {
        "gpu memory": max((gpu.memory_bytes or 0 for gpu in found.gpus), default=0) / 1e9,
        "cores": float(found.usable_cores),
        "memory": found.memory_bytes / 1e9,
        "disk": _disk_bytes(found) / 1e9,
    }
    return [Standing(need, have[need.name]) for need in NEEDS]


def _disk_bytes(found: Machine) -> int:
    """Of the whole disk: the plan names its size, not what is free."""
    try:
        return shutil.disk_usage(found.disk_path).total
    except OSError:
        return found.disk_free_bytes


def outdated(installed: Mapping[str, str | None], requirements: Sequence[str] | None = None) -> list[str]:
    """Packages below what pingjia was made with: "peft 0.9 (needs 0.21 or newer)". Those not installed are left out."""
    return [
        f"{name} {have} (needs {least} or newer)"
        for name, least in _least(requirements)
        if (have := installed.get(name)) and _numbers(have) < _numbers(least)
    ]


def _least(requirements: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("pingjia") or []
        except importlib.metadata.PackageNotFoundError:
            return
    for text in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?.*?>=\s*([0-9][0-9.]*)", text.partition(";")[0])
        if match:
            yield match[1], match[2]


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); what follows the numbers does not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
