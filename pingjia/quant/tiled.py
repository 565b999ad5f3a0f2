"""Layers whose packed weight may live in the kernels' order: preparing them, and staying a normal module meanwhile.

Plain is how layers are made, loaded, saved, trained and moved. `prepare_for_inference` reorders the bytes of every
packed layer of a network that sits on the CPU; the plain tensors then have no columns, so that nothing reads them by
mistake, and `state_dict`, `load_state_dict`, `deepcopy` and `to` still see the published tensors. Not here: arithmetic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from pingjia.quant import kernels
from pingjia.quant.native import Tiles


class Tiled(nn.Module):
    """A module with `weight` and `weight_scale` (packed) that may be kept as `tiles` instead."""

    bits: int
    weight: torch.Tensor
    weight_scale: torch.Tensor
    tiles: Tiles | None = None

    def prepare(self) -> None:
        """Reorder the weight for the kernels."""
        if self.tiles is None:
            _keep_tiles([self])

    def restore(self) -> None:
        """Back to the plain tensors."""
        if self.tiles is not None:
            self.weight, self.weight_scale = self.tiles.plain()
            self.tiles = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if self.tiles is not None and fn(torch.empty(0)).device.type != "cpu":
            self.restore()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is None:
            return
        weight, scale = self.tiles.plain()
        for name, tensor in (("weight", weight), ("weight_scale", scale)):
            if prefix + name in destination:  # a tied head keeps its scale out
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        tiled = self.tiles is not None
        self.restore()
        super()._load_from_state_dict(*args)
        if tiled:
            self.prepare()


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Reorder the packed layers of a network for the CPU kernels, one at a time, in place; return the network.

    Without kernels it warns (once) that products will be slow and how to get them. Layers elsewhere than on the CPU
    are left alone.
    """
    if not kernels.available():
        warnings.warn(f"packed layers will run in plain torch, several times slower: {kernels.why_not()}", stacklevel=2)
        return model
    for tied in _plain_layers(model).values():
        _keep_tiles(tied)
    return model


def _plain_layers(model: nn.Module) -> dict[int, list[Tiled]]:
    """Layers still to reorder, those that share a weight together."""
    layers: dict[int, list[Tiled]] = {}
    for module in model.modules():
        if isinstance(module, Tiled) and module.tiles is None and module.weight.device.type == "cpu":
            layers.setdefault(id(module.weight), []).append(module)
    return layers


def _keep_tiles(tied: list[Tiled]) -> None:
    """Give layers that share one weight one set of tiles, and one empty weight: they are still tied."""
    weight, scale = tied[0].weight, tied[0].weight_scale
    tiles = Tiles.of(weight, scale, tied[0].bits)
    empty = nn.Parameter(weight.new_empty(tiles.n, 0), requires_grad=False)
    for module in tied:
        module.tiles, module.weight, module.weight_scale = tiles, empty, scale.new_empty(tiles.n, 0)


def restore_plain(model: nn.Module) -> nn.Module:
    """Undo `prepare_for_inference`: before training on, or converting the network."""
    for module in model.modules():
        if isinstance(module, Tiled):
            module.restore()
    return model
