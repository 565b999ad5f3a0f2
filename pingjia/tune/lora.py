"""Which linears get an adapter, and the adapter's files. The adapter itself is PEFT's, in PEFT's format.

A name that matches nothing stops the run: a silently skipped module is how a run "succeeds" having trained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.quant.convert import count_weights
from pingjia.quant.formats import PackedLinear
from pingjia.recipe import near_miss
from pingjia.tune.groups import layer_of
from pingjia.tune.new_tokens import token_indices
from pingjia.tune.pissa import require_plain_base
from pingjia.tune.ranges import parse_layers
from pingjia.tune.settings import TuneSettings


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules to adapt: their names as PEFT takes them, layer numbers from 0 (None: all), and every full name."""

    names: tuple[str, ...]
    layers: tuple[int, ...] | None
    modules: tuple[str, ...]


def resolve_targets(model: PreTrainedModel, family: Family, settings: TuneSettings) -> Targets:
    """Everything the run adapts: `lora_target` in `lora_layers`, or what its phases take together.

    Raises TrainingError when any part matches nothing.
    """
    if not settings.phases:
        return resolve(model, family, settings.lora_target, settings.lora_layers)
    parts = [resolve(model, family, phase.target, phase.layers or settings.lora_layers) for phase in settings.phases]
    modules = tuple(dict.fromkeys(module for part in parts for module in part.modules))
    if all(part.layers is None for part in parts):
        return Targets(tuple(dict.fromkeys(name for part in parts for name in part.names)), None, modules)
    return Targets(modules, None, modules)


def resolve(model: PreTrainedModel, family: Family, wanted: Sequence[str], layers: str | None) -> Targets:
    """Turn names or groups, and layers, into modules. Raises TrainingError when any part matches nothing.

    Layers choose among the modules that lie in layers; an embedding, which lies in none, is taken as it is named.
    """
    places = adaptable(model)
    numbers = parse_layers(layers, num_layers(places))
    names: list[str] = []
    for want in wanted or family.default_target:
        names.extend(_names_of(want, places, family.lora_groups))
    names = list(dict.fromkeys(names))
    modules = tuple(m for m in places if _in_layers(m, numbers) and any(_ends_with(m, n) for n in names))
    idle = [n for n in names if not any(_ends_with(m, n) for m in modules)]
    if idle:
        raise TrainingError(f"lora_layers {layers}: no {idle[0]} in those layers; nothing would be trained")
    if numbers is not None and any(layer_of(m + ".") is None for m in modules):
        return Targets(modules, None, modules)  # PEFT's choice of layers would pass over what lies in none
    return Targets(tuple(names), numbers, modules)


def add_adapter(model: PreTrainedModel, targets: Targets, settings: TuneSettings) -> PeftModel:
    """Put a fresh LoRA on `targets`; only its matrices require a gradient. The same seed gives the same matrices."""
    require_plain_base(model, settings.init_lora_weights)
    if settings.use_dora:
        _require_floats_for_dora(model)
    torch.manual_seed(settings.seed)
    adapted = get_peft_model(model, _config(targets, settings, token_indices(model, settings, targets.modules)))
    got = {module_name(name) for name in _lora_a(adapted)}
    if got != set(targets.modules):
        odd = sorted(got ^ set(targets.modules))
        raise TrainingError(f"PEFT adapted other modules than asked: {len(odd)} differ, for example {odd[0]}")
    return adapted


def _require_floats_for_dora(model: PreTrainedModel) -> None:
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    if packed:
        raise TrainingError(
            f"use_dora reads the base's weights as floats, and {len(packed)} of them are packed (quantization_bit); "
            "leave use_dora out, or set quantization_method=bitsandbytes, which PEFT can unpack"
        )


def _config(targets: Targets, settings: TuneSettings, tokens: dict[str, list[int]] | None) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets.names),
        layers_to_transform=list(targets.layers) if targets.layers is not None else None,
        layers_pattern="layers" if targets.layers is not None else None,
        rank_pattern=_ranks(targets.modules, settings),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        trainable_token_indices=tokens,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _ranks(modules: Sequence[str], settings: TuneSettings) -> dict[str, int]:
    """PEFT's rank_pattern: full module name -> rank, for those that differ from lora_rank."""
    found: dict[str, int] = {}
    depth = max((layer_of(m + ".") or 0 for m in modules), default=0) + 1
    for text, rank in settings.lora_rank_pattern.items():
        numbers = parse_layers(text, depth, "lora_rank_pattern")
        assert numbers is not None
        found |= {m: rank for m in modules if layer_of(m + ".") in numbers}
    return found


def module_name(lora_a: str) -> str:
    """Name in the base network of the module whose matrix A has this name in the adapted one."""
    return lora_a.removeprefix("base_model.model.").split(".lora_")[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all). Packed quantised weights count as the numbers they stand for."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, count_weights(model)


def _lora_a(model: torch.nn.Module) -> list[str]:
    """Names of the matrices A: of linears, and of embeddings, where PEFT keeps them as parameters."""
    linears = [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
    return linears + [name for name, _ in model.named_parameters() if name.endswith(".lora_embedding_A.default")]


def adaptable(model: torch.nn.Module) -> list[str]:
    """Full names of what can have a LoRA: every linear but the head, and the input embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def num_layers(modules: Sequence[str]) -> int:
    return max((layer for m in modules if (layer := layer_of(m + ".")) is not None), default=-1) + 1


def _in_layers(module: str, layers: tuple[int, ...] | None) -> bool:
    layer = layer_of(module + ".")
    return layers is None or layer is None or layer in layers


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _names_of(wanted: str, places: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if wanted == "all":
        return groups["attention"] + groups["ffn"]
    if wanted in groups:
        return groups[wanted]
    if any(_ends_with(module, wanted) for module in places):
        return (wanted,)
    known = sorted({module.rsplit(".", 1)[-1] for module in places})
    hint = near_miss(wanted, [*known, *groups, "all"])
    raise TrainingError(
        f"lora_target {wanted!r} matches no linear layer{hint}; this network has {', '.join(known)} "
        f"(or a group: {', '.join([*groups, 'all'])})"
    )
