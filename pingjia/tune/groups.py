"""Which parameter learns at which rate: a contract that is checked, printed, and handed to the optimizer.

Every trainable parameter is in exactly one group, or the run stops before its first update.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pingjia.errors import TrainingError
from pingjia.tune.ranges import describe, parse_layers

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
OTHER = "other"
"""What is in no layer: embeddings, head, final norm."""


@dataclass(slots=True)
class RateGroup:
    """Parameters that share a rate. `rate` is the peak of the schedule; `label` says which layers they are in."""

    label: str
    rate: float
    names: list[str] = field(default_factory=list)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return sum(p.numel() for p in self.parameters)

    @property
    def modules(self) -> tuple[str, ...]:
        """Last names of the modules, in order: q_proj, v_proj."""
        return tuple(dict.fromkeys(module_of(name).rpartition(".")[2] for name in self.names))


@dataclass(frozen=True, slots=True)
class Rates:
    """What decides a parameter's rate. `layers`: range -> rate (and "other"); empty: `rate` for all.

    `b_ratio`: LoRA+ (arXiv:2402.12354), how many times faster B learns than A.
    """

    rate: float
    layers: Mapping[str, float] = field(default_factory=dict)
    b_ratio: float = 1.0


def group_parameters(named: Iterable[tuple[str, torch.nn.Parameter]], rates: Rates, num_layers: int) -> list[RateGroup]:
    """Share out the trainable parameters among `named`. Groups are in the order of the ranges, none is empty.

    Raises TrainingError for ranges that overlap, and for a trainable parameter that is in none.
    """
    ranges = _ranges(rates.layers, num_layers)
    groups: dict[tuple[str, float], RateGroup] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        label, rate = _place(name, ranges, rates)
        rate *= rates.b_ratio if is_b(name) else 1.0
        group = groups.setdefault((label, rate), RateGroup(label, rate))
        group.names.append(name)
        group.parameters.append(parameter)
    order = [label for label, _, _ in ranges]
    return sorted(groups.values(), key=lambda g: (order.index(g.label) if g.label in order else len(order), g.rate))


def _ranges(layers: Mapping[str, float], num_layers: int) -> list[tuple[str, frozenset[int] | None, float]]:
    """(label, layer numbers from 0 or None for what is in no layer, rate) of each range."""
    key = "layer_learning_rates"
    taken: dict[int, str] = {}
    found: list[tuple[str, frozenset[int] | None, float]] = []
    for text, rate in layers.items():
        if text == OTHER:
            found.append((OTHER, None, rate))
            continue
        numbers = parse_layers(text, num_layers, key)
        assert numbers is not None
        for layer in numbers:
            if layer in taken:
                raise TrainingError(f"{key}: layer {layer + 1} is in {taken[layer]!r} and in {text!r}; name it once")
            taken[layer] = text
        found.append((f"layers {describe(numbers)}", frozenset(numbers), rate))
    return found


def _place(name: str, ranges: Sequence[tuple[str, frozenset[int] | None, float]], rates: Rates) -> tuple[str, float]:
    if not ranges:
        return "all", rates.rate
    layer = layer_of(name)
    for label, numbers, rate in ranges:
        if (layer is None and numbers is None) or (layer is not None and numbers is not None and layer in numbers):
            return label, rate
    where = f"layer {layer + 1}" if layer is not None else "no layer"
    wanted = str(layer + 1) if layer is not None else OTHER
    raise TrainingError(
        f"layer_learning_rates gives no rate to {module_of(name)} ({where}); add {wanted!r} to it: "
        "every trainable parameter needs exactly one rate"
    )


def layer_of(name: str) -> int | None:
    """Number of the layer a parameter is in, from 0; None for those in no layer."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def module_of(name: str) -> str:
    """Full name of the module of the base network that a parameter belongs to, or is an adapter of."""
    name = name.removeprefix("base_model.model.")
    head, mark, _ = name.partition(".lora_")
    if mark:
        return head
    return name.removesuffix(".default").rpartition(".")[0].removesuffix(".base_layer")


def is_b(name: str) -> bool:
    """Whether a parameter is a LoRA matrix B (the one that starts at zero)."""
    return ".lora_B." in name or ".lora_embedding_B." in name


def optimizer_groups(groups: Sequence[RateGroup], weight_decay: float = 0.0) -> list[dict[str, object]]:
    """As torch's optimizers take them; `peak` is the rate that the schedule multiplies.

    With `weight_decay`, a network's own norms and biases are put in groups that do not decay: pulled towards 0 they
    would switch off what they scale.
    """
    made: list[dict[str, object]] = []
    for group in groups:
        common = {"lr": group.rate, "peak": group.rate, "name": group.label}
        named = list(zip(group.names, group.parameters, strict=True))
        spared = [p for name, p in named if weight_decay and p.ndim < 2 and ".lora_" not in name]
        kept = {id(p) for p in spared}
        decaying = [p for _, p in named if id(p) not in kept]
        made += [{"params": decaying, **common}] if decaying else []
        made += [{"params": spared, **common, "weight_decay": 0.0}] if spared else []
    return made
