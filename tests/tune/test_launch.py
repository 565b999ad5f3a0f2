"""Processes are started with torchrun's variables, end together, and leave none behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pingjia.cli.schema import load_recipe, save_recipe
from pingjia.errors import TrainingError
from pingjia.tune import launch as module
from pingjia.tune.launch import LOST, Layout, launch, layout_of, read_hostfile
from pingjia.tune.settings import DistributedSettings

REPO = Path(__file__).resolve().parents[2]
LAYOUT = Layout(3, 0, 3, "127.0.0.1", 29999)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}"]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.glob("pid*")) if file.read_text()]


def wait_for(condition: object, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_every_process_gets_its_place(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    code = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names.split()!r}))"
    assert launch(python(code), Layout(2, 4, 8, "10.0.0.1", 29500)) == 0
    assert (tmp_path / "4").read_text() == "4 0 8 2 10.0.0.1 29500"
    assert (tmp_path / "5").read_text() == "5 1 8 2 10.0.0.1 29500"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("if rank == 1: sys.exit(print('error: row 7 is bad', file=sys.stderr) or 2)", "process 1 of 3: row 7 is bad"),
        ("if rank == 2: os.kill(os.getpid(), signal.SIGKILL)", "process 2 of 3 was ended by SIGKILL; the system may"),
        ("if rank == 0: raise ValueError('what now')", "process 0 of 3: .*ValueError: what now"),
        (
            # The others only lost their peer, whatever they say and however soon.
            "if rank == 2: sys.exit(print('error: the cause', file=sys.stderr) or 2)\nos.abort()",
            "process 2 of 3: the cause",
        ),
        (
            f"if rank == 2: raise ValueError('the cause')\nsys.exit(print('error: {LOST}', file=sys.stderr) or 2)",
            "process 2 of 3: .*ValueError: the cause",
        ),
    ],
)
def test_the_first_that_fails_ends_all_and_is_named(tmp_path: Path, code: str, message: str) -> None:
    code = f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\ntime.sleep(0.5)\n{code}\n"
    with pytest.raises(TrainingError, match=re.compile(message, re.DOTALL)):
        launch(python(code + "time.sleep(60)"), LAYOUT)
    assert len(pids(tmp_path)) == 3
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def launcher(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A process that launches three others, which write their ids to tmp_path."""
    code = (
        "from pingjia.tune.launch import die_with_launcher\ndie_with_launcher()\n"
        f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n{body}"
    )
    script = f"import sys\nfrom pingjia.tune.launch import *\nsys.exit(launch({python(code)!r}, {LAYOUT!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], text=True, cwd=REPO)
    assert wait_for(lambda: len(pids(tmp_path)) == 3), "they did not start"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: int) -> None:
    body = (
        f"seen = []\nsignal.signal({int(number)}, lambda *_: seen.append(1))\n"
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w')\n"
        "while not seen: time.sleep(0.05)\ntime.sleep(0.5)\nsys.exit(130 if len(seen) == 1 else 7)"
    )
    process = launcher(tmp_path, body)
    assert wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 3)
    process.send_signal(number)
    assert process.wait(30) == 130


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent is gone")
def test_a_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    process = launcher(tmp_path, "time.sleep(60)")
    process.kill()
    process.wait()
    assert wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


def test_the_buffers_of_its_processes_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARED_MEMORY", tmp_path)
    layout = Layout(2, 0, 2, "127.0.0.1", 41000)
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_"
    for rest in ("41000_0", "41000_1", "41001_0", "4100_0"):
        (tmp_path / f"{name}{rest}").touch()
    assert launch([sys.executable, "-c", ""], layout) == 0
    assert {path.name.removeprefix(name) for path in tmp_path.iterdir()} == {"41001_0", "4100_0"}


def test_the_hostfile_says_who_runs_what(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode1 slots=4\n\nnode2 slots=2  # the old one\n")
    assert read_hostfile(file) == [("node1", 4), ("node2", 2)]
    second = layout_of(DistributedSettings(hostfile=str(file), node_rank=1))
    assert second == Layout(2, 4, 6, "node1", 29500)
    with pytest.raises(TrainingError, match=r"node_rank=2, but .* has 2 hosts"):
        layout_of(DistributedSettings(hostfile=str(file), node_rank=2))
    assert read_hostfile(REPO / "deploy" / "hostfile") == [("node1", 4), ("node2", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", r"hosts:1: 'node1' is not `host slots=N`"),
        ("node1 slots=0\n", "slots=0"),
        ("a slots=1\nb 2\n", "hosts:2"),
        ("a slots=1\na slots=1\n", "a is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_faulty_hostfile_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_processes_read_the_very_recipe(tmp_path: Path) -> None:
    source = next((REPO / "recipes").glob("demo.yaml"))
    recipe = load_recipe(source, ["learning_rate=1e-5", "distributed.strategy=fsdp2", "cost.price_per_hour=3"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["distributed"] == {"strategy": "fsdp2"}


def test_the_whole_command_trains_in_processes(tmp_path: Path, tiny_llama: Path, rows_file: Path) -> None:
    """`pingjia train` itself: one bar, the shares, the result; a wrong model is named by its error."""
    recipe = tmp_path / "recipe.yaml"
    keys = {"model_name_or_path": str(tiny_llama), "dataset": str(rows_file), "output_dir": str(tmp_path / "out")}
    keys |= {"device": "cpu", "max_steps": 2, "lora_rank": 2, "report_to": "none"}
    recipe.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "pingjia.cli.main", "train", str(recipe), "distributed.strategy=fsdp2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "distributed.processes=2"], capture_output=True, text=True, check=False, env=environment, cwd=REPO
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"process 1: [\d,]+ of [\d,]+ parameters \(5\d\.\d%\)", done.stdout)
    assert done.stdout.count("2 updates in") == 1
    assert (tmp_path / "out" / "pingjia.json").is_file()
