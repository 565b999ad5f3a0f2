"""docs/serve.md lists the settings, error codes, endpoints and refused fields that there are, no more and no fewer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pingjia.gateway import GatewaySettings, bodies, errors
from pingjia.recipe import Section

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def defaults_of(model, before=""):
    """(key, default) of settings; of a section inside them as outer.inner."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield from defaults_of(type(field.default), f"{before}{name}.")
        else:
            yield before + name, field.default


def test_settings():
    shown = {key.strip("`"): default.strip("`") for key, default, _ in rows("Settings")}
    actual = dict(defaults_of(GatewaySettings))
    assert list(shown) == list(actual)
    for name, default in actual.items():
        if default not in (None, ()):
            assert shown[name] == str(default).replace("True", "true").replace("False", "false"), name


def test_error_codes():
    sources = "".join(path.read_text() for path in Path(errors.__file__).parent.glob("*.py"))
    sources += (ROOT / "pingjia" / "errors.py").read_text()
    shown = {code for _, cell, _ in rows("Errors") for code in re.findall(r"`(\w+)`", cell)}
    assert all(f'"{code}"' in sources for code in shown)
    mapped = {(str(status), code) for status, _, code in errors._PLAIN.values()}
    assert mapped <= {(status, code) for status, cell, _ in rows("Errors") for code in re.findall(r"`(\w+)`", cell)}
    assert set(re.findall(r'code="(\w+)"', sources)) <= shown


def test_refused_fields():
    paragraph = PAGE.split("Refused with 400", 1)[1].split("Every other unknown field", 1)[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) - {"none", "auto"} == set(bodies._REFUSED)


@pytest.mark.parametrize("body", [bodies.SamplingBody, bodies.ChatBody])
def test_accepted_fields(body):
    section = PAGE.split("## What a request may say", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`(\w+)`", section)) | {"messages", "stream", "stream_options"}
    assert set(body.model_fields) <= named


def test_endpoints(gateway):
    shown = set(re.findall(r"`(?:GET|POST|DELETE) (/[^`]*)`", "".join(row[0] for row in rows("Endpoints"))))
    served = {path.replace("{model_id}", "{id}") for path in gateway.http.get("/openapi.json").json()["paths"]}
    assert shown == served | {"/openapi.json"}
