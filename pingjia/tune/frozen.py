"""The layers below the first one that learns: nothing in them changes, so a row passes through them once.

What comes out of them is kept between epochs as far as a budget of bytes goes; a row beyond it passes again every time.
Each row goes alone, whatever it is batched with later: so kept or computed anew, it is the same to the last bit, and a
run that went on from a checkpoint sees what one that was never stopped sees.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pingjia.models.attention import PackedSequences
from pingjia.models.family import Family
from pingjia.tune.groups import layer_of
from pingjia.tune.products import fast_products
from pingjia.tune.swap import swapped_forward
from pingjia.types import Encoded

Model: TypeAlias = PeftModel | PreTrainedModel
"""What is trained: an adapter on a network, or weights of the network itself."""


@dataclass(frozen=True, slots=True)
class Entering:
    """States of a micro-batch's tokens where they enter the first layer that learns, and the layers they are past."""

    states_1TH: torch.Tensor
    below: tuple[torch.nn.Module, ...]


def network_of(model: Any) -> Any:
    """The network itself, with an adapter on it or without."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The blocks of the network, in order."""
    return next(
        m for n, m in model.named_modules() if n.rpartition(".")[2] == "layers" and isinstance(m, torch.nn.ModuleList)
    )


def num_frozen_layers(model: torch.nn.Module) -> int:
    """How many layers lie below all that learns. 0 when the embedding learns, or dropout is below.

    Where only what lies above the layers learns (last norm, head), the last layer is left out of them.
    """
    lowest = min((_place(model, name, p) for name, p in model.named_parameters() if p.requires_grad), default=0)
    count = min(lowest, len(layers_of(model)) - 1)
    return 0 if count and _draws_noise(model, count) else count


def _place(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> int:
    """The layer a parameter is in; 0 for the embedding, which is below all, and their number for what is above all."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    embedding = network_of(model).get_input_embeddings()
    return 0 if any(p is parameter for p in embedding.parameters()) else len(layers_of(model))


def _draws_noise(model: torch.nn.Module, count: int) -> bool:
    """Whether the embedding or a layer below `count` has dropout: what passes it is then never twice the same."""
    if getattr(model.config, "attention_dropout", 0.0):
        return True
    below = ((layer_of(name + "."), m) for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout))
    return any(m.p > 0 and (layer is None or layer < count) for layer, m in below)


class FrozenLayers:
    """Takes rows through the layers below `count`, without gradients, and remembers what came out."""

    def __init__(self, model: Model, family: Family, count: int, budget_bytes: int) -> None:
        self._network = network_of(model)
        layers = layers_of(self._network)
        self._below, self._first, self._above = tuple(layers[:count]), layers[count], tuple(layers[count + 1 :])
        self._family, self._left_bytes = family, budget_bytes
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def kept_bytes(self) -> int:
        return sum(t.nbytes for t in self._kept.values())

    def entering(self, numbers: Sequence[int], rows: Sequence[Encoded]) -> Entering:
        """What `rows`, whose numbers in the data set are `numbers`, are when they come to the first layer that learns.

        A number must always mean the same row.
        """
        states = [self._states(number, row) for number, row in zip(numbers, rows, strict=True)]
        return Entering(torch.cat(states, dim=1).to(self._network.device), self._below)

    def _states(self, number: int, row: Encoded) -> torch.Tensor:
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        states_1TH = self._pass(row)
        if states_1TH.nbytes <= self._left_bytes:
            self._left_bytes -= states_1TH.nbytes
            self._kept[number] = states_1TH.cpu()
        return states_1TH

    @torch.no_grad()
    @fast_products()
    def _pass(self, row: Encoded) -> torch.Tensor:
        config, device = self._network.config, self._network.device
        seen: list[torch.Tensor] = []

        def take(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(states)
            return states

        with passed_by(self._above), swapped_forward(self._first, take):
            self._network.base_model(
                input_ids=torch.tensor([row.ids], device=device),
                position_ids=self._family.positions(config, row.ids, 0, len(row.ids)).unsqueeze(0).to(device),
                packed=PackedSequences.of([len(row.ids)], [self._family.prefix_len(config, row.ids)]),
                use_cache=False,
            )
        return seen[0]


@contextmanager
def passed_by(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While open, these layers hand on what they are given."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(swapped_forward(layer, lambda states, *_, **__: states))
        yield
