"""Start the processes of a run on this machine, and end them all when one ends badly. Knows no torch.

Each is the same command with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them: a run
that torchrun or DeepSpeed's launcher started is the same run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pingjia.errors import TrainingError
from pingjia.tune.settings import DistributedSettings

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
_PARENT = "PINGJIA_LAUNCHER"  # process id of the launcher
_STARTED = "PINGJIA_STARTED"  # file that the first process makes when all is loaded and checked
_DEFAULT_PORT = 29500  # what torchrun takes
_GRACE_S = 3.0  # from SIGTERM to SIGKILL
_AFTERMATH_S = 1.0  # the others notice a lost peer at once; who was first is seen by how it ended
_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where DeepSpeed puts them
LOST = "the connection to another process was lost"  # how the error begins of those that only lost a peer
STOPPED = 130  # exit code of a run that was asked to stop, and has saved


def is_rank() -> bool:
    """Whether this process is one of several, started by this module or by torchrun."""
    return RANK in os.environ and WORLD_SIZE in os.environ


def processes_here() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get(RANK, "0") == "0"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which processes this machine runs: `first`, `first + 1`, ... of `world_size`; all meet at master_addr:port."""

    num_processes: int
    first: int
    world_size: int
    master_addr: str
    master_port: int

    def environment(self, local: int) -> dict[str, str]:
        return {
            RANK: str(self.first + local),
            "LOCAL_RANK": str(local),
            WORLD_SIZE: str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            _PARENT: str(os.getpid()),
        }


def layout_of(settings: DistributedSettings) -> Layout:
    """Where everyone runs. With a hostfile the first process listens on its first host."""
    if settings.hostfile is None:
        port = settings.master_port or free_port()
        return Layout(settings.processes, 0, settings.processes, settings.master_addr, port)
    hosts = read_hostfile(Path(settings.hostfile))
    if settings.node_rank >= len(hosts):
        raise TrainingError(
            f"distributed.node_rank={settings.node_rank}, but {settings.hostfile} has {len(hosts)} hosts, from 0 on"
        )
    slots = [count for _, count in hosts]
    first = sum(slots[: settings.node_rank])
    port = settings.master_port or _DEFAULT_PORT
    return Layout(slots[settings.node_rank], first, sum(slots), hosts[0][0], port)


def read_hostfile(file: Path) -> list[tuple[str, int]]:
    """(host, processes) of each line `host slots=4`, as DeepSpeed and Open MPI write them; # begins a comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise TrainingError(f"distributed.hostfile {file}: cannot be read: {e.strerror}") from None
    hosts: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key, _, slots = (words[1] if len(words) == 2 else "").partition("=")
        if key != "slots" or not slots.isdigit() or int(slots) < 1:
            raise TrainingError(f"{file}:{number}: {line.strip()!r} is not `host slots=N`")
        if words[0] in (host for host, _ in hosts):
            raise TrainingError(f"{file}:{number}: {words[0]} is there twice; add its slots up in one line")
        hosts.append((words[0], int(slots)))
    if not hosts:
        raise TrainingError(f"{file}: names no host; write lines such as `node1 slots=4`")
    return hosts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch(command: Sequence[str], layout: Layout, on_start: Callable[[], None] = lambda: None) -> int:
    """Run `command` in every process of this machine. Returns 0, or STOPPED when it was interrupted and has saved.

    `on_start()` is called once the first process has called `say_started`.
    Raises TrainingError with what the first process that failed said; by then none is left.
    """
    with tempfile.TemporaryDirectory(prefix="pingjia-ranks-") as folder:
        started = Path(folder) / "started"
        files = [Path(folder) / f"{local}.err" for local in range(layout.num_processes)]
        errors = [open(file, "w+", encoding="utf-8") for file in files]  # noqa: SIM115  closed below
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with _passing_signals_on(processes):
                for local, error in enumerate(errors):
                    processes.append(_start(command, layout, local, error, started))
                failed = _wait(processes, errors, _Once(started.exists, on_start))
                _end(processes)
            if failed is not None:
                raise TrainingError(_what_failed(layout.first + failed, layout, processes[failed], errors[failed]))
            return max(process.returncode for process in processes)
        finally:
            _end(processes)
            _remove_buffers(layout)
            for error in errors:
                error.close()


class _Once:
    """Calls `act` the first time that `is_due` says so."""

    def __init__(self, is_due: Callable[[], bool], act: Callable[[], None]) -> None:
        self._is_due, self._act, self._done = is_due, act, False

    def __call__(self) -> None:
        if not self._done and self._is_due():
            self._done = True
            self._act()


def _start(
    command: Sequence[str], layout: Layout, local: int, error: IO[str], started: Path
) -> subprocess.Popen[bytes]:
    shows = layout.first + local == 0
    return subprocess.Popen(  # noqa: S603  our own command
        command,
        env=os.environ | layout.environment(local) | {_STARTED: str(started)},
        stdin=subprocess.DEVNULL,
        stdout=None if shows else subprocess.DEVNULL,
        stderr=error,
        start_new_session=True,  # Ctrl-C comes to the launcher alone, which passes it on once
    )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], errors: Sequence[IO[str]], watch: Callable[[], None]
) -> int | None:
    """Until all have ended (None), or until one has ended badly (its place)."""
    while True:
        codes = [process.poll() for process in processes]
        watch()
        if any(code not in (None, 0, STOPPED) for code in codes):
            return _cause(processes, errors)
        if None not in codes:
            return None
        time.sleep(0.05)


def _cause(processes: Sequence[subprocess.Popen[bytes]], errors: Sequence[IO[str]]) -> int:
    """Of those that ended badly, the one to blame: killed from outside, then an error of the user's, then one of ours.
    Those that only lost their peers come last: they say so, or gloo ends them by SIGABRT."""
    time.sleep(_AFTERMATH_S)
    bad = [place for place, process in enumerate(processes) if process.poll() not in (None, 0, STOPPED)]

    def blame(place: int) -> int:
        code = processes[place].returncode
        if code == -signal.SIGABRT or LOST in _said(errors[place]):
            return 3
        return 0 if code < 0 else {2: 1}.get(code, 2)

    return min(bad, key=blame)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _remove_buffers(layout: Layout) -> None:
    """DeepSpeed's buffers for messages on one machine: 69 MB of memory for each process, which it leaves behind."""
    mine = f"deepspeed_allreduce_buffer_{os.getuid()}_{layout.master_addr}_{layout.master_port}_"
    for buffer in _SHARED_MEMORY.glob(f"{mine}*"):
        buffer.unlink(missing_ok=True)


def _what_failed(rank: int, layout: Layout, process: subprocess.Popen[bytes], error: IO[str]) -> str:
    who = f"process {rank} of {layout.world_size}"
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        more = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"{who} was ended by {name}{more}. The same command goes on from the last checkpoint"
    return f"{who}: {_said(error) or f'ended with exit code {process.returncode}'}"


def _said(error: IO[str]) -> str:
    """The last error of a process, or the end of what it said."""
    error.seek(0)
    lines = [line.rstrip() for line in error if line.strip()]
    said = [i for i, line in enumerate(lines) if line.startswith(("error: ", "internal error: "))]
    return "\n".join(lines[said[-1] :] if said else lines[-20:]).removeprefix("error: ")


@contextmanager
def _passing_signals_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM of the launcher reach every process; they decide what to do."""

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for n in before:
        signal.signal(n, pass_on)
    try:
        yield
    finally:
        for n in before:
            signal.signal(n, before[n])


def say_started() -> None:
    """In a process that `launch` started: all is loaded and checked."""
    if _STARTED in os.environ:
        Path(os.environ[_STARTED]).touch()


def die_with_launcher() -> None:
    """In a process that `launch` started: end when the launcher is gone, however it went."""
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it went before the line above
        os.kill(os.getpid(), signal.SIGKILL)
