"""Not a test: one process of a run, started by `launch` or forked by rank_server.py.

usage: rank.py JSON, with the keys model, data, tune (settings), and optionally
- holdings: a file for what each process holds
- kill_at: the process `kill_rank` ends by SIGKILL after that update
- out_of_memory: {"rank": 1, "at": {"37": 2}, "in": "forward"}: that process has no memory left twice after update 37,
  in the middle of a layer
- kept_file: a file for how many bytes of frozen layers' results the first process kept
- memory_file: a file for what the run was planned to hold, and what it held at most
- dtypes: a file for the formats in which linears computed in the last process
- overflow: {"rank": 1, "at": {"3": 2}}: its gradients overflow twice after update 3
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, TrainPlan, loop, relief, train, zero3
from pingjia.tune.distributed import Alone
from pingjia.tune.launch import die_with_launcher
from pingjia.tune.settings import TuneSettings

torch.set_num_threads(1)


def die_after(step: int) -> None:
    """SIGKILL in the middle of the update after `step`, between its collectives."""
    real = loop.update

    def update(*args: object, **kwargs: object) -> object:
        nonlocal step
        step -= 1
        if step < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    loop.update = update


class OutOfMemory:
    """Raises in the middle of a layer, in the last micro-batch of chosen updates, as often as told."""

    def __init__(self, at: dict[str, int], where: str) -> None:
        self.at, self.where = {int(step): count for step, count in at.items()}, where
        self.step, self.batches_left, self.is_open = 0, 0, False
        real_layers, real_update = relief.layers_of, loop.update

        def update(*args: Any, **kwargs: Any) -> object:
            self.batches_left, self.is_open = len(args[3]), True
            try:
                result = real_update(*args, **kwargs)
            finally:
                self.is_open = False
            self.step += 1
            return result

        def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
            layers = real_layers(model)
            layers[-1].mlp.register_forward_hook(self.maybe)
            return layers

        loop.update, relief.layers_of = update, layers_of

    def maybe(self, module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        if not self.is_open:
            return
        self.batches_left -= 1
        if self.batches_left > 0 or not self.at.get(self.step):
            return
        if self.where == "backward":
            output.register_hook(self.fail)
        else:
            self.fail()

    def fail(self, grad: object = None) -> None:
        if self.at.get(self.step):
            self.at[self.step] -= 1
            raise torch.OutOfMemoryError(f"injected after update {self.step}")


class Overflow:
    """Makes gradients overflow in chosen updates, so many attempts long."""

    def __init__(self, at: dict[str, int], ranks: type) -> None:
        left, step = {int(key): count for key, count in at.items()}, -1
        real_update, real_backward = loop.update, ranks.backward

        def update(*args: Any, **kwargs: Any) -> object:
            nonlocal step
            step += 1
            return real_update(*args, **kwargs)

        def backward(self: Any, loss: torch.Tensor) -> None:
            falls = left.get(step, 0) > 0
            left[step] = left.get(step, 0) - 1
            real_backward(self, loss * float("inf") if falls else loss)

        loop.update, ranks.backward = update, backward


def note_kept(file: Path) -> None:
    real = loop.FrozenLayers.entering

    def entering(self: Any, *args: Any) -> object:
        result = real(self, *args)
        file.write_text(str(self.kept_bytes))
        return result

    loop.FrozenLayers.entering = entering


def run(job: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    if "kill_at" in job and job["kill_rank"] == rank:
        die_after(job["kill_at"])
    oom = job.get("out_of_memory")
    if oom and oom["rank"] == rank:
        OutOfMemory(oom["at"], oom.get("in", "forward"))
    overflow = job.get("overflow")
    if overflow and overflow["rank"] == rank:
        Overflow(overflow["at"], zero3.Zero3 if job["tune"]["distributed"]["strategy"] == "zero3" else Alone)
    seen: set[str] = set()
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.add(str(output.dtype)) if type(module) is torch.nn.Linear else None
    )
    kept = job.get("kept_file")
    if kept and rank == 0:
        note_kept(Path(kept))
    holdings: list = []
    plans: list[TrainPlan] = []
    result = train(
        ModelSettings(**job["model"]),
        DataSettings(**job["data"]),
        TuneSettings(**job["tune"]),
        hooks=Hooks(on_shared_out=holdings.extend, on_plan=plans.append),
    )
    if "memory_file" in job:
        Path(job["memory_file"]).write_text(json.dumps(asdict(plans[0].memory) | {"measured": result.peak_bytes}))
    if rank and "dtypes" in job:
        Path(job["dtypes"]).write_text(" ".join(sorted(seen)))
    if rank == 0 and "holdings" in job:
        with open(job["holdings"], "w", encoding="utf-8") as file:
            json.dump([[h.rank, h.num_parameters, h.num_all] for h in holdings], file)


if __name__ == "__main__":
    die_with_launcher()
    run(json.loads(sys.argv[1]))
