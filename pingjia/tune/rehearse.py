"""A training run in small, before the real one: the longest batch, save and reload. Leaves nothing behind."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from peft import get_peft_model_state_dict

from pingjia import chat
from pingjia.data.settings import DataSettings
from pingjia.errors import TrainingError
from pingjia.meter import Meter
from pingjia.models import family_of, load_model, max_model_len, use_packed_attention
from pingjia.models.device import pick_device
from pingjia.models.settings import ModelSettings
from pingjia.tune.checkpoint import ADAPTER_FILE, write_adapter
from pingjia.tune.distributed import Alone
from pingjia.tune.groups import Rates, group_parameters, optimizer_groups
from pingjia.tune.lora import add_adapter, count_parameters, resolve, resolve_targets
from pingjia.tune.phases import plan_phases
from pingjia.tune.run import encode_rows
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, update
from pingjia.types import Encoded


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What the run would be, and what its longest update took on this machine (after one to warm up)."""

    num_rows: int
    num_dropped: int
    num_steps: int
    num_trainable: int
    batch_tokens: int
    loss: float
    seconds: float
    peak_bytes: int
    seconds_estimated: float


def rehearse(model_settings: ModelSettings, data_settings: DataSettings, settings: TuneSettings) -> Rehearsal:
    """Two updates on the longest batch, then the adapter saved, read back and compared bit by bit.

    Raises what the real run would raise, and TrainingError when the saved adapter is not the one in memory.
    """
    with Meter() as meter:
        tokenizer = chat.load_tokenizer(model_settings.model_name_or_path)
        model = load_model(
            model_settings.model_name_or_path,
            dtype=model_settings.dtype,
            device=pick_device(model_settings.device),
            bits=model_settings.quantization_bit,
        )
        cutoff_len = min(data_settings.cutoff_len, max_model_len(model.config))
        rows, dropped = encode_rows(data_settings.dataset, data_settings, tokenizer, cutoff_len)
        family = family_of(model)
        phases = plan_phases(len(rows), settings, lambda p: resolve(model, family, p.target, p.layers).modules)
        adapted = add_adapter(model, resolve_targets(model, family, settings), settings)
        use_packed_attention(model)
        adapted.train()
        longest = _longest(rows, settings.per_device_train_batch_size)
        batch = build_batch(longest, family, model.config, model.device)
        ranks = Alone(model.device)
        groups = group_parameters(adapted.named_parameters(), Rates(settings.learning_rate), 0)
        optimizer = ranks.optimizer(adapted, optimizer_groups(groups), settings.weight_decay)
        norm = settings.max_grad_norm
        results = [update(ranks, adapted, optimizer, [batch], rate_factor=1.0, max_grad_norm=norm) for _ in range(2)]
        _check_saved(adapted)
    num_steps = sum(phase.plan.num_steps for phase in phases)
    num_tokens = sum(len(row.ids) for row in rows)
    all_tokens = num_tokens * num_steps / phases[0].plan.updates_per_epoch
    return Rehearsal(
        num_rows=len(rows),
        num_dropped=len(dropped),
        num_steps=num_steps,
        num_trainable=count_parameters(adapted)[0],
        batch_tokens=batch.num_tokens,
        loss=results[-1].loss,
        seconds=results[-1].seconds,
        peak_bytes=meter.peak_bytes,
        seconds_estimated=all_tokens * results[-1].seconds / batch.num_tokens,
    )


def _longest(rows: list[Encoded], count: int) -> list[Encoded]:
    return sorted(rows, key=lambda row: len(row.ids), reverse=True)[:count]


def _check_saved(model: torch.nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), model)
        saved = safetensors.torch.load_file(Path(folder) / ADAPTER_FILE)
    held = get_peft_model_state_dict(model)
    different = [name for name in held if name not in saved or not torch.equal(saved[name], held[name].cpu())]
    if different or len(saved) != len(held):
        raise TrainingError(f"the saved adapter is not the one in memory: {len(different)} tensors differ")
