"""Adapters as values: read from PEFT's files, joined rank beside rank, cut to a budget, put into PEFT's form again.

How an adapter is grown inside a network, and how it is trained, is in grow.py.

Shapes: R rank, I and O input and output width of a linear (of an embedding: its number of rows, and its width).
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from pingjia.errors import TrainingError
from pingjia.tune.shrink import best_of_rank

Tensors = Mapping[str, torch.Tensor]
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<which>[AB])(\.weight)?")


@dataclass(frozen=True, slots=True)
class Lora:
    """What one module's adapter adds to its weight: scale * b_OR a_RI."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def squared_norm(self) -> float:
        """Of scale * B A, without forming it."""
        a, b = self.a_RI.double(), self.b_OR.double()
        return float(((a @ a.T) * (b.T @ b)).sum()) * self.scale**2


Loras = dict[str, Lora]
"""Full name of a module of the base -> its adapter."""


def loras(tensors: Tensors, config: LoraConfig) -> Loras:
    """The adapter in PEFT's tensors. TrainingError for tensors that are no matrices of a plain LoRA."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    embeddings = set()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise TrainingError(f"{name}: only plain LoRA matrices can be joined, cut and grown; merge this one first")
        found.setdefault(match["module"], {})[match["which"]] = tensor
        if match["kind"]:
            embeddings.add(match["module"])
    return {m: Lora(p["A"], p["B"], _scale(config, m, p["A"].shape[0]), m in embeddings) for m, p in found.items()}


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    alphas: Mapping[str, float] = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def joined(old: Loras, new: Loras) -> Loras:
    """Both at once, as one: new ranks beside the old ones, which keep every byte. What the scales differ by goes into
    the new B."""
    both = {m: _beside(old[m], new[m]) if m in old and m in new else (old.get(m) or new[m]) for m in {**old, **new}}
    return dict(sorted(both.items()))


def _beside(old: Lora, new: Lora) -> Lora:
    b_OR = new.b_OR if new.scale == old.scale else new.b_OR * (new.scale / old.scale)
    a = torch.cat([old.a_RI, new.a_RI.to(old.a_RI.dtype)], dim=0)
    b = torch.cat([old.b_OR, b_OR.to(old.b_OR.dtype)], dim=1)
    return replace(old, a_RI=a, b_OR=b)


def cut(adapter: Loras, max_rank: int) -> tuple[Loras, float]:
    """Every module at most of rank `max_rank`, as near as can be; and the share of the squared norm that is lost."""
    kept, lost, total = dict(adapter), 0.0, sum(lora.squared_norm for lora in adapter.values())
    for module, lora in adapter.items():
        if lora.rank > max_rank:
            a, b, one_lost, _ = best_of_rank(lora.a_RI.double(), lora.b_OR.double(), max_rank)
            kept[module] = replace(lora, a_RI=a.to(lora.a_RI.dtype), b_OR=b.to(lora.b_OR.dtype))
            lost += one_lost * lora.scale**2
    return kept, lost / total if total else 0.0


def max_rank_of(adapter: Loras) -> int:
    return max(lora.rank for lora in adapter.values())


def as_peft(adapter: Loras, like: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Tensors and configuration of one plain LoRA. Module by module alpha is the rank times the scale."""
    tensors = {}
    for module, lora in adapter.items():
        kind, end = ("embedding_", "") if lora.is_embedding else ("", ".weight")
        tensors[f"base_model.model.{module}.lora_{kind}A{end}"] = lora.a_RI.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_{kind}B{end}"] = lora.b_OR.detach().cpu().contiguous()
    return tensors, _config(adapter, like)


def _config(adapter: Loras, like: LoraConfig) -> LoraConfig:
    config, ranks = copy.deepcopy(like), {module: lora.rank for module, lora in adapter.items()}
    alphas = {module: lora.scale * lora.rank for module, lora in adapter.items()}
    config.target_modules, config.exclude_modules = sorted(adapter), None
    config.layers_to_transform = config.layers_pattern = None
    config.r, config.rank_pattern = _mostly(ranks)
    config.lora_alpha, config.alpha_pattern = _mostly(alphas)
    config.use_rslora, config.init_lora_weights, config.trainable_token_indices = False, True, None
    return config


def _mostly(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the modules with another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module: value for module, value in values.items() if value != common}
