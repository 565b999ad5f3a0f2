"""Not a test: train in forked children and SIGKILL them at random moments until one of them gets to the end.

usage: killed_run.py JSON, with the keys model, data, tune (settings), seed, max_kills. Prints the number of kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import checkpoint, train, trained
from pingjia.tune.settings import TuneSettings

torch.set_num_threads(1)


def die_at_write(number: int) -> None:
    """Kill this process at its `number`-th step of writing: half of a file, a sync, a rename."""
    count = 0
    real = {"sync": checkpoint._sync, "write": checkpoint.write_bytes, "replace": os.replace}
    real_state, real_tensors = checkpoint.write_state, trained.write_tensors

    def is_due() -> bool:
        nonlocal count
        count += 1
        return count == number

    def write(path: object, data: bytes) -> None:
        if is_due():
            real["write"](path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real["write"](path, data)

    def torn(write: Callable[..., None]) -> Callable[..., None]:
        """Of what goes straight into a file: half of the file is there."""

        def write_half(path: Path, value: object) -> None:
            due = is_due()
            write(path, value)
            if due:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write_half

    def sync(path: object) -> None:
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        real["sync"](path)

    def replace(source: object, target: object) -> None:
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        real["replace"](source, target)

    checkpoint.write_bytes, checkpoint._sync, os.replace = write, sync, replace
    checkpoint.write_state, trained.write_tensors = torn(real_state), torn(real_tensors)


def attempt(job: dict, chance: random.Random, *, may_die: bool, is_first: bool) -> bool:
    """One child; True when it ended by itself, and well. The first one dies for certain: at a write."""
    write, after_s, at_write = chance.randint(1, 9), chance.uniform(0.05, 1.5), is_first or chance.random() < 0.6
    child = os.fork()
    if child == 0:
        if may_die and at_write:
            die_at_write(write)
        train(ModelSettings(**job["model"]), DataSettings(**job["data"]), TuneSettings(**job["tune"]))
        os._exit(0)
    deadline = time.monotonic() + after_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return False
            if os.WEXITSTATUS(status):
                sys.exit(f"the child ended with {os.WEXITSTATUS(status)}")
            return True
        if may_die and not at_write and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def main() -> None:
    job = json.loads(sys.argv[1])
    chance, kills = random.Random(job["seed"]), 0
    while not attempt(job, chance, may_die=kills < job["max_kills"], is_first=kills == 0):
        kills += 1
    print(kills)


main()
