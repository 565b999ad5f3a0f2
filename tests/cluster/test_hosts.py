"""Replicas on hosts of their own: network namespaces, each with a cable to the host of Consul and nginx."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
from load import Clients
from servers import ConsulServer, Nginx, Processes, Replicas, until


class Hosts:
    """Namespaces on a bridge of their own; the bridge's address is 10.213.X.1, where Consul and nginx are."""

    def __init__(self) -> None:
        self.tag = uuid.uuid4().hex[:6]
        self.net = f"10.213.{int(self.tag, 16) % 200 + 20}"
        self.bridge = f"pb{self.tag}"
        self.names: list[str] = []

    def open(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.net}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def add(self) -> tuple[str, str]:
        """A new host: its namespace and its address."""
        number = len(self.names) + 2
        name, cable = f"pn{self.tag}{number}", f"pc{self.tag}{number}"
        ip("netns", "add", name)
        self.names.append(name)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", cable, "master", self.bridge, "up")
        ip("-n", name, "addr", "add", f"{self.net}.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        return name, f"{self.net}.{number}"

    def pull(self, number: int, state: str) -> None:
        """The cable of a host: "down" or "up"."""
        ip("link", "set", f"pc{self.tag}{number + 2}", state)

    def close(self) -> None:
        for name in self.names:
            ip("netns", "del", name)
        ip("link", "del", self.bridge)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts(need) -> Iterator[Hosts]:
    need("ip", "consul", "nginx")
    if os.geteuid() != 0:
        pytest.skip("hosts of their own (network namespaces) need root")
    made = Hosts()
    try:
        made.open()
    except RuntimeError as e:
        pytest.skip(f"this machine gives no network namespaces: {e}")
    yield made
    made.close()


def test_a_host_whose_cable_is_pulled_is_out_and_comes_back(hosts: Hosts, processes: Processes) -> None:
    consul = ConsulServer(processes, host=f"{hosts.net}.1")
    consul.start()
    replicas = Replicas(processes, consul.url, leave_s=0.5)
    for name in ("near", "far"):
        namespace, address = hosts.add()
        replicas.start(name, netns=namespace, host=address, port=8000, key="sk-hosts")
    nginx = Nginx(processes)
    nginx.watch(consul.url)
    nginx.start()
    until(lambda: len(nginx.weights()) == 2, "both in nginx")
    time.sleep(1.0)
    clients = Clients(nginx.url, tokens=20, key="sk-hosts").steady(8.0)
    time.sleep(2.0)
    pulled_at = time.monotonic()
    hosts.pull(1, "down")
    until(lambda: "far" not in nginx.weights(), "the far one out")
    out_s = time.monotonic() - pulled_at
    time.sleep(2.0)
    after = clients.between(pulled_at + out_s + 1.0, time.monotonic())
    hosts.pull(1, "up")
    until(lambda: "far" in nginx.weights(), "the far one in again", 30.0)
    time.sleep(1.0)
    asked = clients.stop()  # what hung in the cable went on when it was plugged in again
    assert out_s < 5.0
    assert after
    assert not [one.error for one in after if one.error]
    assert {one.replica for one in after} == {f"{hosts.net}.2:8000"}
    # A connection that could not be opened within a second went to the other one; nothing was lost.
    assert not [one.error for one in asked if one.error]


def test_status_across_hosts(hosts: Hosts, processes: Processes) -> None:
    consul = ConsulServer(processes, host=f"{hosts.net}.1")
    consul.start()
    namespace, address = hosts.add()
    Replicas(processes, consul.url, leave_s=0.5).start("one", netns=namespace, host=address, port=8000, key="sk-hosts")
    line = [sys.executable, "-m", "pingjia.cli.main", "cluster", "status", "--consul", consul.url]

    def shown() -> str:
        return subprocess.run(line, capture_output=True, text=True, check=False).stdout

    out = until(lambda: (out := shown()) and "passing" in out and out, "a passing replica")
    assert out.splitlines()[1].split()[:4] == ["one", f"{address}:8000", "passing", out.splitlines()[1].split()[3]]
    assert out.splitlines()[1].split()[4] == "0"
