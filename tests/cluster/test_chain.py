"""Replicas, Consul, the watch and nginx together, under load, while something breaks.

Short versions of benchmarks/cluster.py, where the same functions give the published figures.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import Clients
from servers import until

_spec = importlib.util.spec_from_file_location(
    "benchmark_cluster", Path(__file__).resolve().parents[2] / "benchmarks" / "cluster.py"
)
assert _spec is not None
assert _spec.loader is not None
bench = importlib.util.module_from_spec(_spec)
sys.modules["benchmark_cluster"] = bench
_spec.loader.exec_module(bench)

RATES = {"r0": 200.0, "r1": 200.0, "r2": 100.0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from servers import missing

    lacking = missing("consul", "nginx")
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed: sudo sh tests/install-debian-packages.sh")
    made = bench.Chain(tmp_path_factory.mktemp("chain"), RATES, leave_s=4.0)
    yield made
    made.close()


@pytest.fixture
def clients(chain: Any) -> Iterator[Clients]:
    """Clients at half of what the pool can do, half of them streaming."""
    made = Clients(chain.nginx.url, tokens=20).steady(0.5 * sum(RATES.values()) / 20)
    yield made
    made.stop()


def test_shares_are_those_of_the_measured_speeds(chain, clients):
    time.sleep(4.0)
    asked = clients.stop()
    assert not [one.error for one in asked if one.error]
    weights = chain.nginx.weights()
    assert bench.off(bench.shares(asked), {name: float(w) for name, w in weights.items()}, chain) < 0.25  # 50 requests


def test_a_killed_one_costs_only_what_it_had_in_hand(chain, clients):
    time.sleep(1.0)
    in_work = chain.in_work("r0")
    chain.replicas.signal("r0", signal.SIGKILL)
    chain.until_out("r0")
    chain.replicas.of["r0"].wait()
    chain.replicas.start("r0")
    chain.until_in("r0")
    asked = clients.stop()
    failed = [one for one in asked if one.error]
    assert len(failed) <= in_work + 2  # two more may have come between looking and killing
    assert {one.replica for one in failed} <= {chain.address("r0"), ""}


def test_a_frozen_one_is_out_in_time_and_its_answers_are_finished_when_it_thaws(chain, clients):
    time.sleep(1.0)
    chain.replicas.signal("r1", signal.SIGSTOP)
    out_s = chain.until_out("r1")
    chain.replicas.signal("r1", signal.SIGCONT)
    chain.until_in("r1")
    assert not [one.error for one in clients.stop() if one.error]
    assert out_s < 5.0


def test_consul_restarts_even_without_its_data_and_nothing_is_lost(chain, clients):
    for forgets in (False, True):
        chain.consul.stop()
        if forgets:
            chain.consul.forget()
        chain.consul.start()
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            assert set(chain.nginx.weights()) == set(RATES)
            time.sleep(0.05)
    until(lambda: chain.status().count("passing") == len(RATES), "all replicas written down again")
    assert not [one.error for one in clients.stop() if one.error]


def test_a_rolling_restart_loses_nothing(chain, clients):
    command = chain.replicas.restart_command + ' \'{{"version": "2"}}\''
    done = chain.command("rollout", "--restart", command, "--expect-version", "2", "--timeout", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 replicas changed\n"
    assert not [one.error for one in clients.stop() if one.error]
    rows = json.loads(chain.command("status", "--json").stdout)["replicas"]
    assert [(row["name"], row["state"], row["version"]) for row in rows] == [(n, "passing", "2") for n in RATES]


def test_a_bad_version_stops_the_rollout_and_is_taken_back(chain, clients):
    bad = chain.replicas.restart_command + ' \'{{"version": "3", "fails": true}}\''
    good = chain.replicas.restart_command + ' \'{{"version": "2", "fails": false}}\''
    done = chain.command("rollout", "--restart", bad, "--back", good, "--timeout", "8")
    assert done.returncode == 2
    assert re.search(r"stopped at r0: r0 answers again: not within 8 s \(it is failed: .*put back: r0\n$", done.stderr)
    rows = json.loads(chain.command("status", "--json").stdout)["replicas"]
    assert [row["version"] for row in rows] == ["2", "2", "2"]
    assert not [one.error for one in clients.stop() if one.error]


def test_an_adapter_comes_to_all_by_its_digest(chain, tmp_path):
    (tmp_path / "digest").write_text("a" * 64)
    one = ["rollout", "--adapter", f"shop={tmp_path}", "--timeout", "20"]
    assert chain.command(*one, "--digest", "a" * 64).returncode == 0
    rows = json.loads(chain.command("status", "--json").stdout)["replicas"]
    assert [row["adapters"] for row in rows] == [{"shop": "a" * 64}] * 3
    refused = chain.command(*one, "--digest", "b" * 64)
    assert refused.returncode == 2
    assert "holds another adapter (aaaaaaaaaaaa) than ordered (bbbbbbbbbbbb)" in refused.stderr
    names = {m["id"] for m in httpx.get(f"{chain.nginx.url}/v1/models", trust_env=False).json()["data"]}
    assert names == {"stub", "shop"}
    assert chain.command("rollout", "--adapter", "shop=").returncode == 0
    rows = json.loads(chain.command("status", "--json").stdout)["replicas"]
    assert [row["adapters"] for row in rows] == [{}] * 3


def test_drain_and_back(chain, clients):
    done = chain.command("drain", "r1")
    assert (done.returncode, done.stdout) == (0, "r1: drained, nothing in work\n")
    assert "r1" not in chain.nginx.weights()
    table = chain.command("status").stdout
    assert re.search(r"^r1 +127\.0\.0\.1:\d+ +draining ", table, re.MULTILINE)
    assert chain.command("drain", "r1", "--undo").returncode == 0
    chain.until_in("r1")
    assert not [one.error for one in clients.stop() if one.error]
    unknown = chain.command("drain", "nobody")
    assert unknown.returncode == 2
    assert "no replica 'nobody' in the pool 'pingjia'; there is r0, r1, r2" in unknown.stderr


def test_once_is_what_is_in_force(chain, tmp_path):
    file = tmp_path / "once.conf"
    done = chain.command("nginx", "--once", "--out", str(file), "--test-command", "", "--reload-command", "")
    assert done.returncode == 0, done.stderr
    from pingjia.cluster.nginx import read_members

    assert {m.name for m in read_members(file.read_text())} == set(RATES)
    assert {m.name for m in read_members(chain.command("nginx", "--once").stdout)} == set(RATES)
