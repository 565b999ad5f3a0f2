"""The files of deploy/ on two hosts: two network namespaces with a cable between them, and gloo over it. Needs root."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pingjia.tune.journal import read_log

REPO = Path(__file__).resolve().parents[2]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STRATEGY = "zero3" if HAS_DEEPSPEED else "fsdp2"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Address -> network namespace of two hosts."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are two network namespaces, which need root and `ip` (iproute2)")
    names = {FIRST: f"pj{os.getpid()}a", SECOND: f"pj{os.getpid()}b"}
    try:
        for name in names.values():
            ip("netns", "add", name)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"two hosts are two network namespaces, and none can be made here: {e.stderr}")
    try:
        first, second = names.values()
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for address, name in names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, rows_file: Path, settings: dict[str, Any]) -> Path:
    keys = {"model_name_or_path": str(tiny_llama), "dataset": str(rows_file), "output_dir": str(tmp_path / "out")}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings | keys | {"device": "cpu", "report_to": "none", "lora_target": "all"}))
    return file


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "BIN": str(Path(sys.executable).parent)} | more


def rank_on(namespace: str, rank: int) -> int | None:
    """Process id of one of the run's processes."""
    for pid in ip("netns", "pids", namespace).split():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            is_python = b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and is_python:
            return int(pid)
    return None


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def num_updates(out: Path) -> int:
    log = out / "trainer_log.jsonl"
    return len(read_log(log)) if log.exists() else 0


def test_torchrun_on_two_hosts(hosts: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    script = str(REPO / "deploy" / "train-torchrun.sh")
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, script, str(recipe), "max_steps=3"],
            env=environment(NODES="2", NODE_RANK=str(number), MASTER=FIRST, PROCESSES="1", STRATEGY="ddp"),
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, name in enumerate(hosts.values())
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "process 1: " in said[0]
    assert num_updates(tmp_path / "out") == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def multi_node(recipe: Path, folder: Path, hosts: dict[str, str], *overrides: str) -> subprocess.Popen[str]:
    """deploy/train-multi-node.sh, where ssh is a command that enters the host's namespace."""
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in hosts))
    ssh = folder / "ssh"
    cases = "".join(f"{address}) name={name};; " for address, name in hosts.items())
    ssh.write_text(f'#!/bin/sh\ncase $2 in {cases}esac\nshift 2\nexec ip netns exec "$name" sh -c "$*"\n')
    ssh.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(REPO / "deploy" / "train-multi-node.sh"), str(recipe), *overrides],
        env=environment(PATH=path, HOSTFILE=str(folder / "hostfile"), STRATEGY=STRATEGY),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts_lose_a_process_and_go_on(hosts: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    """Killed on the second host after update 3; the first one is told, and the same command ends the run."""
    updates = ["max_steps=24", "num_train_epochs=24"]
    run = multi_node(recipe, tmp_path, hosts, *updates)
    try:
        wait_for(lambda: num_updates(tmp_path / "out") >= 3 or run.poll() is not None, 200)
        pid = rank_on(hosts[SECOND], 1)
        assert pid is not None, run.communicate()[0]
        os.kill(pid, signal.SIGKILL)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    words = " ".join(said.split())
    assert run.returncode == 2, said
    assert "process 1 of 2 was ended by SIGKILL" in words
    assert re.search(rf"process 0 of 2: the connection to another process was lost .*{re.escape(SECOND)}", words), said
    wait_for(lambda: not any(ip("netns", "pids", name).split() for name in hosts.values()), 20)
    before = num_updates(tmp_path / "out")
    assert 3 <= before < 24
    run = multi_node(recipe, tmp_path, hosts, *updates)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said
    assert "going on from" in said
    assert [log.step for log in read_log(tmp_path / "out" / "trainer_log.jsonl")] == list(range(1, 25))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
