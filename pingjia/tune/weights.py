"""Which of a network's own weights learn, where it is trained without an adapter: `full` all of them, `freeze` some.

Not here: what of that a phase opens (phases.py), and how it is kept (checkpoint.py, directory.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.models.packing import stored_bits
from pingjia.recipe import near_miss
from pingjia.tune.groups import layer_of, module_of
from pingjia.tune.lora import Targets, num_layers
from pingjia.tune.ranges import parse_layers
from pingjia.tune.settings import PhaseSettings, TuneSettings

ALL, NORMS, HEAD = "all", "norms", "head"


def require_trainable(model: PreTrainedModel, settings: TuneSettings) -> None:
    """Raise TrainingError for a base whose weights cannot take a small step: packed ones, or half-precision floats."""
    kind = f"finetuning_type={settings.finetuning_type}"
    bits = stored_bits(model)
    if bits is not None:
        raise TrainingError(
            f"{kind}: the base is packed to {bits}, and a step of the learning rate is far smaller than the distance "
            "between two packed values: nothing would move. Leave out quantization_bit (or take the float checkpoint), "
            "or train an adapter over it: finetuning_type=lora"
        )
    if model.dtype != torch.float32:
        name = str(model.dtype).removeprefix("torch.")
        raise TrainingError(
            f"{kind}: in {name} most updates would be rounded away (the smallest step of a weight is "
            f"{torch.finfo(model.dtype).eps:.1g} of it); leave dtype out or set it to float32, or train an adapter: "
            "finetuning_type=lora"
        )


def resolve_weights(model: PreTrainedModel, family: Family, settings: TuneSettings) -> Targets:
    """The modules whose weights learn over the whole run. Raises TrainingError when any part matches nothing."""
    if settings.finetuning_type == "freeze":
        modules = _frozen_but(model, family, settings)
        return Targets(_last_names(modules), None, modules)
    if settings.phases:
        parts = [modules_of_phase(model, family, phase) for phase in settings.phases]
        modules = tuple(dict.fromkeys(module for part in parts for module in part))
        return Targets(_last_names(modules), None, modules)
    return Targets((ALL,), None, tuple(_places(model)))


def modules_of_phase(model: PreTrainedModel, family: Family, phase: PhaseSettings) -> tuple[str, ...]:
    """The modules that a phase opens."""
    places = _places(model)
    numbers = parse_layers(phase.layers, num_layers(places), "layers")
    inside = [m for m in places if numbers is None or layer_of(m + ".") is None or layer_of(m + ".") in numbers]
    return _owners(model, _named(model, family, phase.target, inside, "phases: target"))


def open_weights(model: PreTrainedModel, targets: Targets) -> PreTrainedModel:
    """Let the weights of `targets` learn, in float32, and nothing else. Weights used twice (a tied head) learn once."""
    modules = set(targets.modules)
    for name, parameter in model.named_parameters():
        learns = module_of(name) in modules
        if learns and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # tables of a half-precision checkpoint are kept as stored
        parameter.requires_grad_(learns)
    return model


def _frozen_but(model: PreTrainedModel, family: Family, settings: TuneSettings) -> tuple[str, ...]:
    places = _places(model)
    numbers = _chosen_layers(settings.freeze_trainable_layers, num_layers(places))
    inside = [m for m in places if layer_of(m + ".") in numbers]
    outside = [m for m in places if layer_of(m + ".") is None]
    wanted, extra = settings.freeze_trainable_modules, settings.freeze_extra_modules
    found = _named(model, family, wanted, inside, "freeze_trainable_modules") if numbers else ()
    return _owners(model, (*found, *_named(model, family, extra, outside, "freeze_extra_modules")))


def _chosen_layers(count: int, depth: int) -> range:
    if abs(count) > depth:
        raise TrainingError(f"freeze_trainable_layers is {count}, and the network has {depth} layers; at most {depth}")
    return range(depth - count, depth) if count >= 0 else range(-count)


def _places(model: torch.nn.Module) -> list[str]:
    """Full names of the modules that have weights of their own, in the order of the network."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


def _named(
    model: PreTrainedModel, family: Family, wanted: Iterable[str], places: Sequence[str], key: str
) -> tuple[str, ...]:
    """The modules among `places` that names or groups stand for."""
    found: list[str] = []
    for want in wanted:
        modules = _one(model, family, want, places)
        if not modules:
            groups = [*family.lora_groups, NORMS, HEAD, ALL]
            known = sorted({part for place in places for part in place.split(".") if not part.isdigit()})
            raise TrainingError(
                f"{key} {want!r} matches no weights{near_miss(want, [*known, *groups])}; there are {', '.join(known)} "
                f"(or a group: {', '.join(groups)})"
            )
        found.extend(modules)
    return tuple(dict.fromkeys(found))


def _one(model: PreTrainedModel, family: Family, want: str, places: Sequence[str]) -> list[str]:
    if want == ALL:
        return list(places)
    if want == HEAD:
        head = model.get_output_embeddings()
        return [place for place in places if model.get_submodule(place) is head]
    if want == NORMS:
        return [p for p in places if not isinstance(model.get_submodule(p), torch.nn.Linear | torch.nn.Embedding)]
    names = family.lora_groups.get(want, (want,))
    return [place for place in places if any(f".{name}." in f".{place}." for name in names)]


def _owners(model: torch.nn.Module, modules: Sequence[str]) -> tuple[str, ...]:
    """The same weights by the names under which a network lists them: a tied head is listed as the embedding."""
    owner = {id(parameter): module_of(name) for name, parameter in model.named_parameters()}
    found = [owner[id(p)] for module in modules for p in model.get_submodule(module).parameters(recurse=False)]
    return tuple(dict.fromkeys(found))


def _last_names(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules))
