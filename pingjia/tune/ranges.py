"""Layers as users write them: "13-28", "1-4,9", or as shares of the depth, "0-0.5"."""

from __future__ import annotations

import re

from pingjia.errors import TrainingError

_NUMBERS = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*")
_SHARES = re.compile(r"\s*(\d*\.\d+|[01])\s*-\s*(\d*\.\d+|[01])\s*")


def parse_layers(text: str | None, num_layers: int, key: str = "lora_layers") -> tuple[int, ...] | None:
    """Layer numbers from 0, sorted; None for None. `key` is named in errors.

    "13-28", "1-4,9": numbered from 1, both ends included. "0-0.5": layers i with 0 < i/num_layers <= 0.5, so that
    "0-0.5" and "0.5-1" share out every network. A range with a point in it is a share. TrainingError beyond the depth.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        layers.update(_share(part, text, num_layers, key) if "." in part else _numbered(part, text, num_layers, key))
    if not layers:
        raise TrainingError(f"{key} {text!r}: no layer of {num_layers} lies in it")
    return tuple(sorted(layers))


def _numbered(part: str, text: str, num_layers: int, key: str) -> range:
    match = _NUMBERS.fullmatch(part)
    if not match:
        raise TrainingError(f"{key} {text!r}: write ranges like 13-28 or 1-4,9, or shares of the depth like 0-0.5")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= num_layers:
        raise TrainingError(f"{key} {text!r}: the network has layers 1-{num_layers}, not {part.strip()}")
    return range(first - 1, last)


def _share(part: str, text: str, num_layers: int, key: str) -> list[int]:
    match = _SHARES.fullmatch(part)
    low, high = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= low < high <= 1:
        raise TrainingError(f"{key} {text!r}: shares of the depth run from 0 to 1, the smaller one first, like 0-0.5")
    return [i for i in range(num_layers) if low < (i + 1) / num_layers <= high]


def describe(layers: tuple[int, ...]) -> str:
    """ "1-12" or "1-4,9": numbered from 1, as users write them."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer + 1, layer + 1])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
