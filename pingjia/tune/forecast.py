"""The memory plan of a run that is ready to start: its facts, put into the arithmetic of `memory.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer

from pingjia.tune.batches import longest_micro
from pingjia.tune.frozen import layers_of, network_of, num_frozen_layers
from pingjia.tune.fused import is_fused, is_fused_unit
from pingjia.tune.groups import layer_of
from pingjia.tune.loop import Run, max_micro_tokens
from pingjia.tune.memory import Adapters, Held, MemoryPlan, NetworkShape, Work, plan_memory
from pingjia.tune.relief import release_memory, resident_bytes
from pingjia.types import Encoded


def forecast(run: Run) -> MemoryPlan:
    """What the run will hold at its peak if it computes as its recipe says, the longest micro-batch of all phases."""
    config = network_of(run.model).config
    shape = NetworkShape.of(config)
    if any(is_fused_unit(module) for module in run.model.modules()):
        shape = replace(shape, ffn=2 * shape.widest)
    return plan_memory(
        shape,
        _adapters(run),
        _work(run, _longest(run)),
        _held(run),
        kept_states=_kept_states(run, config.hidden_size),
    )


def _longest(run: Run) -> list[Encoded]:
    lengths, size = [len(row.ids) for row in run.rows], run.settings.per_device_train_batch_size
    most = max_micro_tokens(run)
    found = (longest_micro(phase.plan, lengths, size, max_tokens=most) for phase in run.phases)
    return [run.rows[number] for number in max(found, key=lambda rows: sum(lengths[row] for row in rows))]


def _adapters(run: Run) -> Adapters:
    layers = {n: m for n, m in run.model.named_modules() if isinstance(m, LoraLayer) and m.lora_A}
    if not layers:
        return _learning_linears(run.model)
    return Adapters(
        inputs={name: module.in_features for name, module in layers.items()},
        ranks={name: sum(module.r.values()) for name, module in layers.items()},
        dropout=run.settings.lora_dropout > 0,
        fused=any(is_fused(m) for m in layers.values()),
        recomputed=_recomputed(run.model),
        mask_bytes=4 if run.model.device.type == "cpu" else 1,
    )


def _recomputed(model: torch.nn.Module) -> frozenset[str]:
    """Last linears of gated units that have their input computed again: those over floats."""
    units = {f"{name}.down_proj": unit.down_proj for name, unit in model.named_modules() if is_fused_unit(unit)}
    return frozenset(n for n, down in units.items() if type(getattr(down, "base_layer", None)) is torch.nn.Linear)


def _learning_linears(model: torch.nn.Module) -> Adapters:
    """Of a run that trains the network itself: a linear that learns keeps its input, as the A of an adapter does."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad}
    head = network_of(model).get_output_embeddings()
    inputs = {name: linear.in_features for name, linear in linears.items() if linear is not head}
    return Adapters(inputs=inputs, ranks={}, dropout=False, mask_bytes=0)


def _work(run: Run, rows: list[Encoded]) -> Work:
    learning = [layer_of(name) or 0 for name, p in run.model.named_parameters() if p.requires_grad]
    return Work(
        row_tokens=tuple(len(row.ids) for row in rows),
        num_learnt=sum(row.num_learnt for row in rows),
        num_learning_layers=len(layers_of(run.model)) - min(learning, default=0),
        element_bytes=network_of(run.model).dtype.itemsize,
        checkpointing=run.settings.gradient_checkpointing,
    )


def _held(run: Run) -> Held:
    release_memory(run.model.device)
    learning = [p for p in run.model.parameters() if p.requires_grad]
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    weights, adapters = _bytes([*frozen, *run.model.buffers()]), _bytes(learning)
    process = max(0, resident_bytes() - weights - adapters) if run.model.device.type == "cpu" else 0
    return Held(weights, adapters, sum(p.numel() for p in learning), process)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _kept_states(run: Run, hidden: int) -> int:
    if not num_frozen_layers(run.model):
        return 0
    size = network_of(run.model).dtype.itemsize
    return min(int(run.settings.activation_cache_gb * 1e9), hidden * size * sum(len(row.ids) for row in run.rows))
