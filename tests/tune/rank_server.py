"""Not a test: forks the processes of one run after another, so that libraries are imported once for all of them.

Reads a line {"count": 2, "job": {...}} and answers with a line [[code, what was said], ...], one of each process. When
one ends badly the others have ten seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import rank

from pingjia.errors import PingjiaError
from pingjia.tune.launch import Layout, free_port

PATIENCE_S = 10
os.environ["DS_ACCELERATOR"] = "cpu"
if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed  # noqa: F401  once here, not in every process


def child(job: dict[str, Any], layout: Layout, number: int, said: Path) -> None:
    os.environ.update(layout.environment(number))
    os.dup2(2, 1)  # libraries print
    code = 0
    try:
        rank.run(job)
    except PingjiaError as e:
        said.write_text(str(e))
        code = 2
    except BaseException:
        said.write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def answer(job: dict[str, Any], count: int, folder: Path) -> list[tuple[int, str]]:
    layout = Layout(count, 0, count, "127.0.0.1", free_port())
    children: dict[int, int] = {}
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            child(job, layout, number, folder / str(number))
        children[pid] = number
    codes = ended(children)
    files = [folder / str(number) for number in range(count)]
    return [(codes[number], file.read_text() if file.exists() else "") for number, file in enumerate(files)]


def ended(children: dict[int, int]) -> dict[int, int]:
    """Exit code of each, once all have ended, by themselves or by force."""
    codes: dict[int, int] = {}
    deadline: float | None = None
    while len(codes) < len(children):
        for pid, number in children.items():
            if number in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + PATIENCE_S
        time.sleep(0.01)
    return codes


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(answer(request["job"], request["count"], Path(folder))), flush=True)


main()
