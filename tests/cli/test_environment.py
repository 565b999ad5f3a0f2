"""Every flag of the verbs that serve has an environment twin, whoever adds the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from pingjia.cli.environment import twin_of
from pingjia.cli.main import app

COMMAND = typer.main.get_command(app)
VERBS = ("serve", "gateway", "worker")
PARAMETERS = [(verb, parameter) for verb in VERBS for parameter in COMMAND.commands[verb].params]


def variable_of(parameter) -> str:
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return "PINGJIA_" + (flags[0] if flags else parameter.name).strip("-").replace("-", "_").upper()


@pytest.mark.parametrize(("verb", "parameter"), PARAMETERS, ids=lambda value: getattr(value, "name", value))
def test_every_flag_has_its_variable(verb, parameter):
    if parameter.name == "help":
        pytest.skip("asks for nothing that a service needs")
    assert parameter.envvar == variable_of(parameter)


def test_no_two_flags_of_a_verb_share_one():
    for verb in VERBS:
        names = [parameter.envvar for parameter in COMMAND.commands[verb].params]
        assert len(names) == len(set(names)) >= 7


def test_the_help_names_them():
    done = subprocess.run(
        [sys.executable, "-m", "pingjia.cli.main", "worker", "--help"], capture_output=True, text=True, check=True
    )
    assert "PINGJIA_REDIS_URL" in done.stdout
    assert "PINGJIA_DEVICE" in done.stdout


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PINGJIA_PORT": "-1"}, "PINGJIA_PORT"),
        ({"PINGJIA_HOST": "203.0.113.9", "PINGJIA_API_KEYS": "sk-x"}, "203.0.113.9 is not an address of this machine"),
        ({"PINGJIA_SET": "serve.ports=1"}, "did you mean port"),
        ({"PINGJIA_SET": "serve.drain_s=1 worker.frozen=1"}, "worker.frozen: unknown"),
        ({"PINGJIA_ADAPTER": "a=x a=y"}, "two adapters are called 'a'"),
    ],
)
def test_they_are_obeyed(variables, says):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PINGJIA_")}
    environ |= {"PINGJIA_MODEL": "no-model", "PINGJIA_PORT": "0", **variables}
    command = [sys.executable, "-m", "pingjia.cli.main", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split()), done.stderr


def test_names():
    assert twin_of("redis_url", ()) == "PINGJIA_REDIS_URL"
    assert twin_of("overrides", ("--set",)) == "PINGJIA_SET"
    assert twin_of("quiet", ("--quiet/--loud", "-q")) == "PINGJIA_QUIET"
