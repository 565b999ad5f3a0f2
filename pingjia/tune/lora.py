"""Which linears get an adapter, and the adapter's files. The adapter itself is PEFT's, in PEFT's format.

A name that matches nothing stops the run: a silently skipped module is how a run "succeeds" having trained nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.quant.convert import count_weights
from pingjia.recipe import near_miss
from pingjia.tune.settings import TuneSettings

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Targets:
    """The linears to adapt: the names as PEFT takes them, layer numbers from 0 (None: all), and every full name."""

    names: tuple[str, ...]
    layers: tuple[int, ...] | None
    modules: tuple[str, ...]


def resolve_targets(model: PreTrainedModel, family: Family, settings: TuneSettings) -> Targets:
    """Turn `lora_target` and `lora_layers` into modules. Raises TrainingError when any part matches nothing."""
    linears = _linears(model)
    layers = parse_layers(settings.lora_layers, _num_layers(linears))
    names: list[str] = []
    for wanted in settings.lora_target or family.default_target:
        names.extend(_names_of(wanted, linears, family.lora_groups))
    names = list(dict.fromkeys(names))
    modules = [m for m in linears if _in_layers(m, layers) and any(_ends_with(m, n) for n in names)]
    idle = [n for n in names if not any(_ends_with(m, n) for m in modules)]
    if idle:
        raise TrainingError(
            f"lora_layers {settings.lora_layers}: no {idle[0]} in those layers; nothing would be trained"
        )
    return Targets(tuple(names), layers, tuple(modules))


def parse_layers(text: str | None, num_layers: int) -> tuple[int, ...] | None:
    """ "13-28" or "1-4,9" (from 1, ends included) -> layer numbers from 0. TrainingError beyond the network's depth."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise TrainingError(f"lora_layers {text!r}: write ranges like 13-28 or 1-4,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= num_layers:
            raise TrainingError(f"lora_layers {text!r}: the network has layers 1-{num_layers}, not {part.strip()}")
        layers.update(range(first - 1, last))
    return tuple(sorted(layers))


def add_adapter(model: PreTrainedModel, targets: Targets, settings: TuneSettings) -> PeftModel:
    """Put a fresh LoRA on `targets`; only its matrices require a gradient. The same seed gives the same matrices."""
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets.names),
        layers_to_transform=list(targets.layers) if targets.layers is not None else None,
        layers_pattern="layers" if targets.layers is not None else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    adapted = get_peft_model(model, config)
    got = {name.removesuffix(".lora_A.default").removeprefix("base_model.model.") for name in _lora_a(adapted)}
    if got != set(targets.modules):
        odd = sorted(got ^ set(targets.modules))
        raise TrainingError(f"PEFT adapted other modules than asked: {len(odd)} differ, for example {odd[0]}")
    return adapted


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all). Packed quantised weights count as the numbers they stand for."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, count_weights(model)


def _lora_a(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]


def _linears(model: torch.nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [n for n, m in model.named_modules() if _is_linear(m) and m is not head]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def _num_layers(linears: Sequence[str]) -> int:
    numbers = [int(match[1]) for name in linears if (match := _LAYER.search(name))]
    return max(numbers, default=-1) + 1


def _in_layers(module: str, layers: tuple[int, ...] | None) -> bool:
    match = _LAYER.search(module)
    return layers is None or (match is not None and int(match[1]) in layers)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _names_of(wanted: str, linears: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if wanted == "all":
        return groups["attention"] + groups["ffn"]
    if wanted in ("attention", "ffn"):
        return groups[wanted]
    if any(_ends_with(module, wanted) for module in linears):
        return (wanted,)
    known = sorted({module.rsplit(".", 1)[-1] for module in linears})
    hint = near_miss(wanted, [*known, "attention", "ffn", "all"])
    raise TrainingError(
        f"lora_target {wanted!r} matches no linear layer{hint}; this network has {', '.join(known)} "
        "(or a group: attention, ffn, all)"
    )
