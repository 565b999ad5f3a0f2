"""Real servers in processes of their own, for benchmarks and tests of the cluster: Consul, nginx, stub replicas."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from stub_settings import StubSettings  # noqa: E402


def free_ports(num: int) -> list[int]:
    """Ports nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def missing(*commands: str) -> list[str]:
    """Those that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [command for command in commands if shutil.which(command, path=path) is None]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0, every_s: float = 0.05) -> Any:
    """Wait for a true value and return it. AssertionError when it never comes."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"never happened within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return value


@dataclass
class Processes:
    """Starts processes with their output in `directory`; all of them end with `stop`. netns: run inside one."""

    directory: Path
    all: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], *, netns: str = "", env: dict[str, str] | None = None) -> Any:
        whole = ["ip", "netns", "exec", netns, *command] if netns else list(command)
        environ = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT)}
        environ |= {"XDG_STATE_HOME": str(self.directory), "OMP_NUM_THREADS": "1", **(env or {})}
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(whole, stdout=log, stderr=log, env=environ, cwd=ROOT)
        self.all.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def stop(self) -> None:
        for process in reversed(self.all):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(20)


class ConsulServer:
    """One Consul server with its data on the disk, so that a restart forgets nothing unless told to."""

    def __init__(self, processes: Processes, *, host: str = "127.0.0.1", netns: str = "", more: str = "") -> None:
        self.processes, self.host, self.netns = processes, host, netns
        self.http, self.rpc, self.serf, self.wan, self.https = free_ports(5)
        self.data = processes.directory / "consul-data"
        self.data.mkdir(exist_ok=True)
        self.more = more
        self.process: Any = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http}"

    def start(self) -> None:
        config = self.data.parent / "consul.hcl"
        https = self.https if "cert_file" in self.more else -1
        config.write_text(
            f"ports {{ http = {self.http} https = {https} server = {self.rpc} serf_lan = {self.serf} "
            f"serf_wan = {self.wan} dns = -1 grpc = -1 }}\n"
            f'bind_addr = "{self.host}"\nclient_addr = "{self.host}"\n'
            "performance { raft_multiplier = 1 }\nleave_on_terminate = false\n" + self.more
        )
        self.process = self.processes.start(
            "consul",
            ["consul", "agent", "-server", "-bootstrap-expect=1", "-node=here", f"-data-dir={self.data}",
             f"-config-file={config}"],
            netns=self.netns,
        )  # fmt: skip
        until(self.has_leader, "a leader of Consul", 30.0)

    def has_leader(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/v1/status/leader", timeout=1.0, trust_env=False).json())
        except (httpx.HTTPError, ValueError):
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def forget(self) -> None:
        """Lose everything. While stopped."""
        shutil.rmtree(self.data)
        self.data.mkdir()


class Nginx:
    """nginx with a file that `pingjia cluster nginx --scope main` keeps."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        (self.port,) = free_ports(1)
        self.run_dir = processes.directory / "nginx"
        self.run_dir.mkdir()
        self.file = self.run_dir / "nginx.conf"
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Any = None

    def watch(self, consul: str, *, service: str = "pingjia", netns: str = "") -> Any:
        """Start the watcher; returns once it has written a file."""
        watcher = self.processes.start(
            "watch",
            [sys.executable, "-m", "pingjia.cli.main", "cluster", "nginx", "--consul", consul, "--service", service,
             "--out", str(self.file), "--scope", "main", "--listen", f"127.0.0.1:{self.port}",
             "--set", f"run_dir={self.run_dir}", "--set", "worker_processes=1", "--set", "longest_answer_s=120",
             "--set", "show_replica=true"],
            netns=netns,
        )  # fmt: skip
        until(lambda: self.file.exists() or watcher.poll() is not None, "a file for nginx", 30.0)
        assert watcher.poll() is None, self.processes.log("watch").read_text()[-2000:]
        return watcher

    def start(self) -> None:
        self.process = self.processes.start("nginx", ["nginx", "-c", str(self.file), "-g", "daemon off;"])
        until(lambda: (self.run_dir / "nginx.pid").exists(), "nginx")

    def weights(self) -> dict[str, int]:
        """Name -> weight in the file now."""
        from pingjia.cluster.nginx import read_members

        return {member.name: member.weight for member in read_members(self.file.read_text())}


class Wire:
    """A way from a replica to Consul that can be cut: a TCP proxy in threads."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._is_cut = False
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on nothing goes through, and new connections hang."""
        self._is_cut = True
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            if self._is_cut:
                time.sleep(1.0)
                return
            with suppress(OSError), socket.create_connection(self._to) as far:
                self._open |= {near, far}
                back = threading.Thread(target=self._copy, args=(far, near), daemon=True)
                back.start()
                self._copy(near, far)
                back.join()
                self._open -= {near, far}

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Replicas:
    """Stub replicas by name."""

    def __init__(self, processes: Processes, consul: str, **settings: Any) -> None:
        self.processes, self.consul, self.settings = processes, consul, settings
        self.of: dict[str, Any] = {}
        self.given: dict[str, StubSettings] = {}

    def start(self, name: str, *, wait: bool = True, netns: str = "", **settings: Any) -> Any:
        """Start one; again with the settings it had."""
        if name in self.given:
            base = self.given[name]
            told = StubSettings(**{**base.__dict__, **settings})
        else:
            port = settings.pop("port", None) or free_ports(1)[0]
            told = StubSettings(port=port, name=name, **{"consul": self.consul, **self.settings, **settings})
        self.given[name] = told
        process = self.processes.start(name, [sys.executable, str(HERE / "stub.py"), told.argument()], netns=netns)
        self.of[name] = process
        self._note(name, process.pid, told)
        if wait:
            until(lambda: self._answers(told) or process.poll() is not None, f"{name} answering", 60.0)
            assert process.poll() is None, self.processes.log(name).read_text()[-3000:]
        return process

    def _note(self, name: str, pid: int, told: StubSettings) -> None:
        """For `restart.py`, which is run as an operator's command."""
        note = {"pid": pid, "told": told.argument(), "log": str(self.processes.log(name))}
        (self.processes.directory / f"{name}.json").write_text(json.dumps(note))

    @property
    def restart_command(self) -> str:
        """What `pingjia cluster rollout --restart` takes."""
        return f"{sys.executable} {HERE / 'restart.py'} {self.processes.directory} {{name}}"

    def stop_restarted(self) -> None:
        """End those that `restart.py` started."""
        for name in self.of:
            pid = json.loads((self.processes.directory / f"{name}.json").read_text())["pid"]
            if pid != self.of[name].pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _answers(self, told: StubSettings) -> bool:
        try:
            return httpx.get(f"http://{told.host}:{told.port}/health/live", timeout=1.0, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def signal(self, name: str, number: int) -> None:
        self.of[name].send_signal(number)
