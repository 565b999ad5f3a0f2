"""systemd units, Dockerfile and compose file: they parse, name what there is, and nothing in them runs as root.

Images are not built here: that needs a Docker daemon and the network.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from pingjia.cli.main import app
from pingjia.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
DOCKER = ROOT / "deploy" / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yml").read_text())
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMMAND = typer.main.get_command(app)
HARDENED = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "CapabilityBoundingSet": ""}


def variables_of(verb: str) -> set[str]:
    return {parameter.envvar for parameter in COMMAND.commands[verb].params if parameter.envvar}


def service_of(unit: Path) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(unit)
    return parser["Service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_it(unit, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT TESTED: there is no systemd-analyze here; see tests/debian-packages.txt")
    text = unit.read_text().replace("/opt/pingjia/bin/pingjia", sys.executable).replace("redis-server.service", "")
    text = text.replace("EnvironmentFile=/", "EnvironmentFile=-/").replace("User=pingjia\nGroup=pingjia\n", "")
    placed = tmp_path / unit.name.replace("@.", "@1.")
    placed.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(placed)], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if placed.name in line or "Unknown" in line]
    assert not ours, done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_it_is_hardened_and_waits_for_the_drain(unit):
    service = service_of(unit)
    for name, value in HARDENED.items():
        assert service[name] == value, name
    assert service["User"] == "pingjia"
    assert int(service["TimeoutStopSec"]) > GatewaySettings().drain_s
    assert service["Restart"] == "on-failure"
    verb = service["ExecStart"].split()[1]
    assert verb in COMMAND.commands


@pytest.mark.parametrize("verb", ["gateway", "worker"])
def test_the_examples_of_settings_are_obeyed(verb):
    from pingjia.cli.serve import settings_of

    lines = (ROOT / "deploy" / "systemd" / f"{verb}.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert given.keys() <= variables_of(verb)
    settings_of(given["PINGJIA_SET"].split(), {})


def test_the_compose_file_names_what_there_is():
    assert set(COMPOSE) == {"name", "services", "networks", "volumes"}
    for name, service in COMPOSE["services"].items():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        if "build" in service:
            check_build(name, service)


def check_build(name, service):
    build = service["build"]
    assert f"AS {build['target']}" in DOCKERFILE
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    assert set(service["environment"]) <= variables_of(name)
    assert int(service["stop_grace_period"].removesuffix("s")) > GatewaySettings().drain_s
    for volume in service["volumes"]:
        if isinstance(volume, str):
            assert volume.partition(":")[0] in COMPOSE["volumes"]


def test_only_loopback_is_open():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports == ["127.0.0.1:8000:8000"]


def test_what_the_image_copies_is_there_and_nobody_is_root():
    for words in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.split()[2] for stage in stages] == ["build", "base", "gateway", "worker"]
    assert "USER 10001:10001" in stages[1]
    assert all(stage.startswith("base ") and "USER" not in stage for stage in stages[2:])


@pytest.mark.parametrize("verb", ["gateway", "worker"])
def test_the_images_variables_are_obeyed(verb):
    stage = DOCKERFILE.partition(f"AS {verb}\n")[2].partition("FROM")[0]
    assert set(re.findall(r"(PINGJIA_\w+)=", stage)) <= variables_of(verb)
    assert f'ENTRYPOINT ["pingjia", "{verb}"]' in stage
