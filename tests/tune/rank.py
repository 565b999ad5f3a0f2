"""Not a test: one process of a run, started by test_distributed.py through `launch`.

usage: rank.py JSON, with the keys model, data, tune (settings), and optionally kill_at: the process `kill_rank` ends by
SIGKILL after that update.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, loop, train
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


def main() -> None:
    job = json.loads(sys.argv[1])
    die_with_launcher()
    if "kill_at" in job and job["kill_rank"] == int(os.environ["RANK"]):
        die_after(job["kill_at"])
    holdings: list = []
    train(
        ModelSettings(**job["model"]),
        DataSettings(**job["data"]),
        TuneSettings(**job["tune"]),
        hooks=Hooks(on_shared_out=holdings.extend),
    )
    if os.environ["RANK"] == "0" and "holdings" in job:
        with open(job["holdings"], "w", encoding="utf-8") as file:
            json.dump([[h.rank, h.num_parameters, h.num_all] for h in holdings], file)


main()
